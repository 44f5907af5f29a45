"""In what two traces of one step differ, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from tpuspec.spec.backend import Replica
from tpuspec.tracer.number_plan import told_difference
from tpuspec.tracer.recording import Recording
from tpuspec.tracer.slots import GRADIENT


def differences(old: Recording, new: Recording, replica: Replica) -> list[str]:
    """Says in what two traces of one step differ; [] where one can stand for the other.

    Args:
      old: a recording.
      new: a later one.
      replica: whose optimizers may tell what a constant is.
    """
    moved = [f"{_kind_of(was, now, replica)} ({_value(was)} -> {_value(now)})"
             for was, now in zip(old.numbers, new.numbers, strict=False)
             if was.shape != now.shape or was.dtype != now.dtype or not torch.equal(was, now)]
    if moved:
        return [f"a number in it changes from step to step: {'; '.join(dict.fromkeys(moved))}"]
    if [guard for guard, other in zip(old.guards, new.guards, strict=False) if not guard.equals(other)] or (
            len(old.guards) != len(new.guards)):
        return ["it reads other values from the device from one step to the next"]
    if old.plan != new.plan and (note := told_difference(old.plan, new.plan)) is not None:
        return [note]
    wiring = ("inputs", "sources", "written", "created", "dropped")
    if old.graph != new.graph or old.plan != new.plan or any(
            getattr(old, name) != getattr(new, name) for name in wiring):
        return ["it computes something else from one step to the next, as a branch on a Python value does. Branch with "
                "torch.where, or pass what it branches on in the batch"]
    lasting = [slot for slot in new.created if slot.kind != GRADIENT]
    return [f"it makes its state anew in every step: {', '.join(map(str, lasting[:3]))}"] if lasting else []


def _kind_of(was: Tensor, now: Tensor, replica: Replica) -> str:
    """Guesses what a constant that moves is."""
    if now.numel() != 1 or was.numel() != 1:
        return (f"a tensor {list(now.shape)} that is made on the host in each step; pass it in the batch, or draw it "
                "on the device")
    value = abs(float(now))
    for optimizer in replica.optimizers.values():
        for group in optimizer.param_groups:
            rate = group["lr"]
            if isinstance(rate, float) and value and abs(rate - value) <= 1e-6 * value:
                return "the learning rate; give the schedule to the Trainer (scheduler=...)"
    if float(now) - float(was) == 1:
        return "a counter; use global_step"
    return "a Python number; pass it in the batch, or compute it from global_step on the device"


def _value(tensor: Tensor) -> str:
    return f"{tensor.item():.6g}" if tensor.numel() == 1 else f"{tensor.numel()} values"
