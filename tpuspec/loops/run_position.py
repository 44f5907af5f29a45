"""What a run goes on from besides its model: random state (devices, torch, numpy, Python) and the input's position."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from tpuspec.checkpoint.state import TrainingState
from tpuspec.data.random_state import ProcessRandomState
from tpuspec.errors import CheckpointError
from tpuspec.spec.backend import Backend, RngState


def read_random_state(backend: Backend, of_input: ProcessRandomState | None = None) -> dict[str, Any]:
    """Returns it as a tree that a checkpoint can hold.

    Args:
      backend: has the devices.
      of_input: of the process, where batches were drawn ahead and moved it on; None for the state as it is.
    """
    state = backend.rng_state()
    own = of_input or ProcessRandomState.take()
    name, keys, *rest = own.numpy
    # Where a device has random state of its own only the input draws from torch's on the host; else the model does too.
    torch_state = own.torch if of_input is not None and state.devices else state.host
    return {"torch": torch_state, "devices": list(state.devices), "python": own.python,
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]}


def collect_positions(backend: Backend, input_position: list[dict[str, Any]] | None,
                      of_input: ProcessRandomState | None = None) -> dict[str, Any]:
    """Returns what a checkpoint holds of the input's position and of random state: on the chief that of all hosts."""
    random_state = read_random_state(backend, of_input)
    hosts = backend.coordinator.collect([input_position, random_state])
    if hosts is None or len(hosts) == 1:
        return {"input": input_position, "random": random_state}
    calls = [call for position, _ in hosts for call in position or []]
    return {"input": calls or None, "random": {"hosts": [state for _, state in hosts]}}


def _of_this_host(random_state: dict[str, Any] | None, backend: Backend) -> dict[str, Any] | None:
    """Returns one host's share of a random state; None where it was saved by another number of hosts."""
    coordinator = backend.coordinator
    states = [random_state] if random_state is None or "hosts" not in random_state else random_state["hosts"]
    return states[coordinator.host_index] if len(states) == coordinator.num_hosts else None


def set_host_random_state(state: dict[str, Any]) -> None:
    """Puts torch's, numpy's and Python's random state back."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def set_device_random_state(backend: Backend, state: dict[str, Any]) -> bool:
    """Puts the devices' random state back and leaves the host's; returns False for another number of devices."""
    own = backend.rng_state()
    if len(own.devices) != len(state["devices"]):
        return False
    backend.set_rng_state(RngState(host=own.host, devices=tuple(state["devices"])))
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPosition:
    """Where a training goes on.

    Attributes:
      input: position of each call of input_fn; None at its start.
      random: random state; None where it is to be seeded.
      strict: whether an input that cannot go on from there is an error.
    """

    input: list[dict[str, Any]] | None
    random: dict[str, Any] | None
    strict: bool

    @classmethod
    def of(cls, session: Any, state: TrainingState | None, *, exact: bool) -> Self:
        """Returns that of a checkpoint that was read, or of the session's own last training.

        Raises:
          CheckpointError: `exact`, and the checkpoint lacks it.
        """
        if state is None:
            return cls(input=session.input_position, random=session.random_state, strict=False)
        missing = [name for name in ("input", "random") if name not in state.extra]
        if missing and exact:
            raise CheckpointError(f"The run cannot be resumed exactly: the checkpoint of step {state.global_step} "
                                  f"lacks {' and '.join(missing)}. Set RunConfig(allow_inexact_resume=True).")
        return cls(input=state.extra.get("input"), random=_of_this_host(state.extra.get("random"), session.backend),
                   strict=exact)

    def set_host(self) -> None:
        """Puts the host's random state back, before the first batch is drawn."""
        if self.random is not None:
            set_host_random_state(self.random)

    def set_devices(self, backend: Backend) -> bool:
        """Puts the devices' random state back; returns whether there was one that fits."""
        return self.random is not None and set_device_random_state(backend, self.random)
