"""Loads an export and serves it on any device of torch's; needs neither torch_xla nor the model's code."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from tpuspec.errors import ExportError, InputError
from tpuspec.export.bundle import SERVE, WEIGHTS_FILE, Metadata, checked_path
from tpuspec.export.receiver import SINGLE_RECEIVER
from tpuspec.export.signature import BATCH, Signature, TensorSpec, describe
from tpuspec.spec.export_output import DEFAULT_SIGNATURE


class ServingModel:
    """An exported model; call it with what a server receives.

    Args:
      metadata: of the export.
      program: the function of (weights, what is received).
      weights: by name, on the device.
      device: where it computes.

    Attributes:
      inputs: name -> what it takes; one tensor is called 'input'.
      signatures: name -> what comes back.
      global_step: of its weights.
      metrics: of the evaluation that it was exported behind; {} where there was none.
    """

    def __init__(self, metadata: Metadata, program: Callable[..., Any], weights: Mapping[str, Tensor],
                 device: torch.device) -> None:
        self.inputs: Mapping[str, TensorSpec] = metadata.inputs
        self.signatures: Mapping[str, Signature] = metadata.signatures
        self.global_step, self.metrics = metadata.global_step, metadata.metrics
        self._is_single = metadata.single_input
        self._program, self._weights, self._device = program, dict(weights), device

    def __call__(self, inputs: Any, signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        """Computes the outputs of a signature.

        Args:
          inputs: a tensor or array [batch, ...], or a dict of them, as `self.inputs` says.
          signature: one of `self.signatures`.

        Returns:
          Output name -> tensor [batch, ...].

        Raises:
          ExportError: there is no such signature.
          InputError: an input is missing, unknown, or of another dtype or shape.
        """
        if signature not in self.signatures:
            raise ExportError(f"the export has no signature {signature!r}; it has {sorted(self.signatures)}.")
        named = inputs if isinstance(inputs, Mapping) else {SINGLE_RECEIVER: inputs}
        if named.keys() != self.inputs.keys():
            raise InputError(f"the model takes {describe(self.inputs)}; got {sorted(map(str, named))}.")
        tensors = {name: torch.as_tensor(named[name]) for name in self.inputs}
        self._check(tensors)
        placed = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        with torch.no_grad():
            outputs = self._program(self._weights, placed[SINGLE_RECEIVER] if self._is_single else placed)
        return dict(outputs[signature])

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        for name, spec in self.inputs.items():
            tensor = tensors[name]
            fits = tensor.ndim == len(spec.shape) and all(
                size in (BATCH, None) or size == own for size, own in zip(spec.shape, tensor.shape, strict=True))
            if tensor.dtype != spec.dtype or not fits:
                got = TensorSpec(tensor.dtype, tuple(tensor.shape))
                hint = " Cast it: array.astype('float32')." if tensor.dtype == torch.float64 else ""
                raise InputError(f"input {name!r} must be {spec}; got {got}.{hint}")
        if len(sizes := {tensor.shape[0] for name, tensor in tensors.items()
                         if self.inputs[name].shape[0] == BATCH}) > 1:
            raise InputError(f"all inputs must have the same number of rows; got {sorted(sizes)}.")


def load(path: str | os.PathLike[str], *, tags: Iterable[str] = (SERVE,),
         device: str | torch.device = "cpu") -> ServingModel:
    """Loads an export. A program is code: load only what you trust.

    Args:
      path: the folder, <base>/<timestamp>.
      tags: which program: {'serve'}, or {'serve', 'tpu'}, which model_fn made with params['use_tpu'] true.
      device: where to compute: 'cpu', 'cuda', or 'xla' in a program that has imported torch_xla.

    Raises:
      ExportError: the folder is no export, is damaged, has no program with these tags, or is of another torch.
    """
    folder, wanted = Path(path), frozenset([tags] if isinstance(tags, str) else tags)
    metadata = Metadata.read(folder)
    if wanted not in metadata.programs:
        found = ", ".join("{" + ", ".join(sorted(own)) + "}" for own in metadata.programs)
        raise ExportError(f"no program with tags {{{', '.join(sorted(wanted))}}} was found in {folder}; there is "
                          f"{found}.")
    # Checked in parts, then read again: in one go the weights would lie in memory twice.
    weights = safetensors.torch.load_file(checked_path(folder, WEIGHTS_FILE, metadata))
    content = checked_path(folder, metadata.programs[wanted], metadata).read_bytes()
    target = torch.device(device)
    try:
        with warnings.catch_warnings():
            # Of torch's own reader, on constants that it wraps without a copy.
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            exported = torch.export.load(io.BytesIO(content))
    except Exception as error:
        raise ExportError(f"the program in {folder} was traced by torch {metadata.torch_version}, and torch "
                          f"{torch.__version__} cannot load it: {error}") from error
    if target.type != "cpu":
        exported = move_to_device_pass(exported, target)
    return ServingModel(metadata, exported.module(), {
        name: weights[name].to(target) for name in sorted(weights)}, target)
