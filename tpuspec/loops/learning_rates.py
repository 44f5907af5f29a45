"""Schedules of torch.optim.lr_scheduler: a function of the number of updates, and of what evaluations have given."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, ReduceLROnPlateau

from tpuspec.errors import ConfigError, ConfigTypeError

_SCHEDULED = ("lr", "momentum", "betas")  # what torch's schedules set; OneCycleLR and CyclicLR set all of them


History = Callable[[str | None], Mapping[int, Mapping[str, float]]]
"""Of an evaluation's name, None for the unnamed one: global step -> metric -> value, of all evaluations so far."""


@dataclass(slots=True)
class Plateau:
    """A ReduceLROnPlateau and the metric that it follows.

    Attributes:
      schedule: of torch.
      metric: its name; `name/metric` is that of an evaluation with a name.
      last_step: global step of the evaluation that it has followed last; -1 before any.
    """

    schedule: ReduceLROnPlateau
    metric: str
    last_step: int = -1

    @property
    def evaluation(self) -> str | None:
        """What stands before the first slash: the name of an evaluation, or a part of the metric's own."""
        return self.metric.partition("/")[0] if "/" in self.metric else None

    def follow(self, step: int, name: str | None, metrics: Mapping[str, Any]) -> None:
        """Steps the schedule after an evaluation; one of an older state, and a second one of the same, do not count.

        Raises:
          ConfigError: the evaluation lacks the metric.
        """
        metric = self.metric if name is None else self.metric.removeprefix(f"{name}/")
        if metric not in metrics:
            if name is None and self.evaluation is None:
                raise ConfigError(f"scheduler returned a ReduceLROnPlateau that follows {self.metric!r}, and the "
                                  f"evaluation has {sorted(metrics)}. Name one of these: scheduler=lambda optimizer, "
                                  "params: {'loss': ReduceLROnPlateau(optimizer)}.")
        elif step > self.last_step and name in (None, self.evaluation):
            self.last_step = step
            self.schedule.step(float(metrics[metric]))


class LearningRateSchedules:
    """The schedules of one replica's optimizers.

    They are not saved. A run that goes on from a checkpoint makes them anew and steps them as often as the checkpoint
    counts updates, which gives the rates of a run that never stopped, or those of the schedule that it asks for now.
    A ReduceLROnPlateau is stepped after each evaluation, and in a resumed run by the log of those before.

    Args:
      make: the user's function of (optimizer or dict of them, params).
      optimizers: by name; the name of a single one is ''.
      params: the Trainer's.
      history: reads the logs of evaluations; asked only where there is a ReduceLROnPlateau.

    Raises:
      ConfigTypeError, ConfigError: what `make` returned is no schedule of these optimizers.
    """

    def __init__(self, make: Callable[..., Any], optimizers: Mapping[str, Optimizer],
                 params: Mapping[str, Any], history: History = lambda name: {}) -> None:
        self._make, self._optimizers, self._params = make, dict(optimizers), params
        self._history = history
        self._plateaus: list[Plateau] = []
        self._num_steps = 0
        self._initial = [copy.deepcopy({key: group[key] for key in _SCHEDULED if key in group})
                         for group in self._groups()]
        self._schedules = self._build()
        self._evaluations()  # an address, which has no log, is refused now

    def evaluated(self, step: int, name: str | None, metrics: Mapping[str, Any]) -> None:
        """Lets a ReduceLROnPlateau follow an evaluation.

        Args:
          step: global step that was evaluated; an older one than the newest does not count.
          name: of the evaluation.
          metrics: its results.

        Raises:
          ConfigError: it lacks the metric.
        """
        if step == self._num_steps:
            for plateau in self._plateaus:
                plateau.follow(step, name, metrics)

    def step(self) -> None:
        """Moves every schedule on by one update."""
        for schedule in self._schedules:
            schedule.step()
        self._num_steps += 1

    def move_to(self, num_updates: int) -> None:
        """Puts every schedule where it is after so many updates."""
        if num_updates < self._num_steps or (self._plateaus and num_updates > self._num_steps):
            for group, initial in zip(self._groups(), self._initial, strict=True):
                group.pop("initial_lr", None)
                group.update(copy.deepcopy(initial))
            self._schedules, self._num_steps = self._build(), 0
        with warnings.catch_warnings():
            # torch warns of schedules that move before their optimizer does; here they catch up with it.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)`", UserWarning)
            evaluations = self._evaluations()
            while True:
                for name, history in evaluations.items():
                    if self._num_steps in history and self._num_steps <= num_updates:
                        self.evaluated(self._num_steps, name, history[self._num_steps])
                if self._num_steps >= num_updates:
                    break
                self.step()

    def _evaluations(self) -> dict[str | None, Mapping[int, Mapping[str, float]]]:
        names = {name for plateau in self._plateaus for name in (None, plateau.evaluation)}
        return {name: self._history(name) for name in sorted(names, key=str)}

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    def _build(self) -> list[LRScheduler]:
        made = self._make(self._optimizers.get("", self._optimizers), copy.deepcopy(dict(self._params)))
        schedules = dict(made) if isinstance(made, Mapping) else {"loss": made}
        for schedule in schedules.values():
            _check(schedule, self._optimizers)
        self._plateaus = [Plateau(schedule, str(name)) for name, schedule in schedules.items()
                          if isinstance(schedule, ReduceLROnPlateau)]
        for plateau in self._plateaus:
            # Changes nothing: torch marks an optimizer as scheduled by every class of schedules but this one.
            ConstantLR(plateau.schedule.optimizer, factor=1.0, total_iters=0)
        return [schedule for schedule in schedules.values() if not isinstance(schedule, ReduceLROnPlateau)]


def _check(schedule: object, optimizers: Mapping[str, Optimizer]) -> None:
    if not isinstance(schedule, LRScheduler):
        raise ConfigTypeError("scheduler must return a torch.optim.lr_scheduler.LRScheduler or a dict of name -> "
                              f"LRScheduler; got {type(schedule).__name__}.")
    if not any(schedule.optimizer is optimizer for optimizer in optimizers.values()):
        raise ConfigError("scheduler returned a schedule of an optimizer that the Trainer did not make. Pass on the "
                          "one that it is given: lambda optimizer, params: CosineAnnealingLR(optimizer, ...).")
