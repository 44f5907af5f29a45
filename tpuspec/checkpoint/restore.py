"""Loading a checkpoint's tensors into a module: all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tpuspec.errors import CheckpointError


def load_into_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies the tensors into the module; names and shapes must be the same, values are cast to the module's dtypes.

    Raises:
      CheckpointError: lists every missing, unexpected and differently shaped name; nothing was loaded.
    """
    check_fits(module, tensors)
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise CheckpointError(f"Restoring from checkpoint failed in {type(module).__name__}: {error}") from error


def check_fits(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Checks names and shapes against the module's, and loads nothing.

    Raises:
      CheckpointError: lists every missing, unexpected and differently shaped name.
    """
    problems = list_mismatches(module.state_dict(), tensors)
    if problems:
        raise CheckpointError(
            "Restoring from checkpoint failed. This is most likely due to a mismatch between the model and the "
            "checkpoint; nothing was loaded:\n" + "\n".join(f"  {problem}" for problem in problems) +
            "\nBuild the model with the settings of that run, or use another model_dir.")


def list_mismatches(expected: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns one line for each name that the checkpoint misses, has besides, or has in another shape."""
    missing = [f"missing in the checkpoint: {name}" for name in expected if name not in tensors]
    unexpected = [f"not in the model: {name}" for name in tensors if name not in expected]
    shaped = [
        f"shape differs: {name} is {list(tensors[name].shape)} in the checkpoint, {list(value.shape)} in the model"
        for name, value in expected.items()
        if name in tensors and isinstance(value, Tensor) and value.shape != tensors[name].shape
    ]
    return missing + unexpected + shaped
