"""Signatures: what a server sends to an exported model, and what it gets back; ExportOutputs as flat tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from tpuspec.errors import ExportError, SpecError
from tpuspec.spec.export_output import ClassificationOutput, ExportOutput, PredictOutput, RegressionOutput

BATCH = "batch"
PREDICT, CLASSIFY, REGRESS = "predict", "classify", "regress"
_CLASSIFICATION_NAMES, _REGRESSION_NAMES = ("scores", "classes"), ("outputs",)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor.

    Attributes:
      dtype: its element type.
      shape: sizes; 'batch' stands for any number of rows, None for a size that varies otherwise.
    """

    dtype: torch.dtype
    shape: tuple[int | str | None, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns what `from_json` takes."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Returns the spec.

        Raises:
          ExportError: there is no such dtype, or no such size.
        """
        dtype = getattr(torch, str(entry["dtype"]), None)
        sizes = all(size in (BATCH, None) or type(size) is int for size in entry["shape"])
        if not isinstance(dtype, torch.dtype) or not sizes:
            raise ExportError(f"no tensor is {entry['dtype']} {entry['shape']}.")
        return cls(dtype, tuple(entry["shape"]))

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{str(self.dtype).removeprefix('torch.')} [{sizes}]"


def describe(specs: Mapping[str, TensorSpec]) -> str:
    """Returns tensors for a message, as in 'image: float32 [batch, 8, 8], mask: bool [batch]'."""
    return ", ".join(f"{name}: {spec}" for name, spec in specs.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One kind of request.

    Attributes:
      kind: 'predict', 'classify' or 'regress', by the ExportOutput that model_fn gave.
      outputs: name -> what comes back, in the order of model_fn.
    """

    kind: str
    outputs: Mapping[str, TensorSpec]

    def as_json(self) -> dict[str, Any]:
        """Returns what `from_json` takes."""
        return {"kind": self.kind, "outputs": {name: spec.as_json() for name, spec in self.outputs.items()}}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Returns the signature.

        Raises:
          ExportError: it says something that no signature says.
        """
        return cls(kind=str(entry["kind"]),
                   outputs={name: TensorSpec.from_json(spec) for name, spec in entry["outputs"].items()})


def kind_of(output: ExportOutput) -> str:
    """Returns the kind of a signature.

    Raises:
      SpecError: no such kind of output can be exported.
    """
    for kind, cls in ((PREDICT, PredictOutput), (CLASSIFY, ClassificationOutput), (REGRESS, RegressionOutput)):
        if isinstance(output, cls):
            return kind
    raise SpecError(f"PredictOutput, ClassificationOutput and RegressionOutput can be exported; got "
                    f"{type(output).__name__}.")


def flatten_output(output: ExportOutput) -> list[Tensor | None]:
    """Returns an output's tensors: the value; those of a prediction in its order; scores and classes, or None for one.

    Raises:
      SpecError: no such kind of output can be exported.
    """
    if isinstance(output, RegressionOutput):
        return [output.value]
    if isinstance(output, ClassificationOutput):
        return [output.scores, output.classes]
    kind_of(output)
    assert isinstance(output, PredictOutput)
    return list(output.outputs.values())


def rebuild_output(like: ExportOutput, tensors: Sequence[Tensor | None]) -> ExportOutput:
    """Returns an output of the same kind and names with other tensors; the inverse of `flatten_output`.

    Raises:
      SpecError: their number is another one, or no such kind of output can be exported.
    """
    expected = len(flatten_output(like))
    if len(tensors) != expected:
        raise SpecError(f"{type(like).__name__} has {expected} tensors; got {len(tensors)}.")
    if isinstance(like, RegressionOutput):
        return RegressionOutput(tensors[0])  # type: ignore[arg-type]
    if isinstance(like, ClassificationOutput):
        return ClassificationOutput(*tensors)
    assert isinstance(like, PredictOutput)
    return PredictOutput(dict(zip(like.outputs, tensors, strict=True)))  # type: ignore[arg-type]


def named_outputs(output: ExportOutput) -> dict[str, Tensor]:
    """Returns what a server gets back: a prediction under its own names, else 'scores' and 'classes', or 'outputs'."""
    names: Iterable[str] = (output.outputs if isinstance(output, PredictOutput) else
                            _CLASSIFICATION_NAMES if isinstance(output, ClassificationOutput) else _REGRESSION_NAMES)
    return {name: tensor for name, tensor in zip(names, flatten_output(output), strict=True) if tensor is not None}
