"""Schedules of torch.optim.lr_scheduler: stepped once an update, and a function of the number of updates alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tpuspec.errors import ConfigError, ConfigTypeError

_SCHEDULED = ("lr", "momentum", "betas")  # what torch's schedules set; OneCycleLR and CyclicLR set all of them


class LearningRateSchedules:
    """The schedules of one replica's optimizers.

    They are not saved. A run that goes on from a checkpoint makes them anew and steps them as often as the checkpoint
    counts updates, which gives the rates of a run that never stopped, or those of the schedule that it asks for now.

    Args:
      make: the user's function of (optimizer or dict of them, params).
      optimizers: by name; the name of a single one is ''.
      params: the Trainer's.

    Raises:
      ConfigTypeError, ConfigError: what `make` returned is no schedule of these optimizers.
    """

    def __init__(self, make: Callable[..., Any], optimizers: Mapping[str, Optimizer],
                 params: Mapping[str, Any]) -> None:
        self._make, self._optimizers, self._params = make, dict(optimizers), params
        self._num_steps = 0
        self._initial = [copy.deepcopy({key: group[key] for key in _SCHEDULED if key in group})
                         for group in self._groups()]
        self._schedules = self._build()

    def step(self) -> None:
        """Moves every schedule on by one update."""
        for schedule in self._schedules:
            schedule.step()
        self._num_steps += 1

    def move_to(self, num_updates: int) -> None:
        """Puts every schedule where it is after so many updates."""
        if num_updates < self._num_steps:
            for group, initial in zip(self._groups(), self._initial, strict=True):
                group.pop("initial_lr", None)
                group.update(copy.deepcopy(initial))
            self._schedules, self._num_steps = self._build(), 0
        with warnings.catch_warnings():
            # torch warns of schedules that move before their optimizer does; here they catch up with it.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)`", UserWarning)
            while self._num_steps < num_updates:
                self.step()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    def _build(self) -> list[LRScheduler]:
        made = self._make(self._optimizers.get("", self._optimizers), copy.deepcopy(dict(self._params)))
        schedules = list(made.values()) if isinstance(made, Mapping) else [made]
        for schedule in schedules:
            _check(schedule, self._optimizers)
        return schedules


def _check(schedule: object, optimizers: Mapping[str, Optimizer]) -> None:
    if not isinstance(schedule, LRScheduler):
        raise ConfigTypeError("scheduler must return a torch.optim.lr_scheduler.LRScheduler or a dict of name -> "
                              f"LRScheduler; got {type(schedule).__name__}.")
    if isinstance(schedule, ReduceLROnPlateau):
        raise ConfigTypeError("scheduler returned ReduceLROnPlateau, which follows a metric; a schedule here follows "
                              "the number of updates. Set the rate in a hook, optimizer.param_groups[0]['lr'].")
    if not any(schedule.optimizer is optimizer for optimizer in optimizers.values()):
        raise ConfigError("scheduler returned a schedule of an optimizer that the Trainer did not make. Pass on the "
                          "one that it is given: lambda optimizer, params: CosineAnnealingLR(optimizer, ...).")
