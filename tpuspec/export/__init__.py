"""Exports: what `Trainer.export` writes, and `load`, which serves it without torch_xla, model code or Trainer."""

from tpuspec.export.receiver import ServingInputReceiver
from tpuspec.export.serving import ServingModel, load
from tpuspec.export.signature import Signature, TensorSpec

__all__ = ["ServingInputReceiver", "ServingModel", "Signature", "TensorSpec", "load"]
