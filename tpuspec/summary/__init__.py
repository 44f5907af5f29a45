"""Summaries: `tpuspec.summary.scalar(name, value)` inside host_call, and the writers behind it."""

from tpuspec.summary.default import as_default, histogram, image, scalar, text
from tpuspec.summary.jsonl import JsonlWriter
from tpuspec.summary.multi import MultiWriter, create_file_writer
from tpuspec.summary.tensorboard import TensorBoardWriter
from tpuspec.summary.writer import SummaryWriter

__all__ = [
    "JsonlWriter",
    "MultiWriter",
    "SummaryWriter",
    "TensorBoardWriter",
    "as_default",
    "create_file_writer",
    "histogram",
    "image",
    "scalar",
    "text",
]
