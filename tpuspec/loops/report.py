"""What a person is told of a run: the banner, and the results of an evaluation."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpuspec.loops.session import Session
from tpuspec.mesh import format_mesh
from tpuspec.spec.backend import Topology
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.results import EvalResult
from tpuspec.summary.writer import SummaryWriter

logger = logging.getLogger(__name__)

_SMALL_ARRAY = 64


def banner_facts(session: Session, *, model_dir: str, batch_sizes: Mapping[ModeKeys, int | None],
                 seed: int) -> dict[str, str]:
    """Returns the facts of a run by name, for the banner."""
    topology = session.backend.topology
    names = {ModeKeys.TRAIN: "train", ModeKeys.EVAL: "eval", ModeKeys.PREDICT: "predict"}
    sizes = [f"{names[mode]} {size}" for mode, size in batch_sizes.items() if size is not None]
    return {
        "devices": f"{len(topology.devices)} x {topology.platform} ({topology.reason})",
        **({"processes": f"{topology.num_hosts}, each with as many devices"} if topology.num_hosts > 1 else {}),
        **({"mesh": format_mesh(topology.mesh)} if topology.mesh else {}),
        "replicas": str(topology.num_replicas),
        "steps": session.backend.step_kind,
        "parameters": f"{session.num_parameters:,}",
        "batch sizes": ", ".join(sizes) or "as input_fn yields",
        "seed": str(seed),
        "model_dir": model_dir,
    }


def layout_of(topology: Topology) -> str:
    """Says how a model uses the devices."""
    if topology.mesh:
        return f"mesh {format_mesh(topology.mesh)}"
    return f"{topology.num_replicas} replicas" if topology.num_replicas > 1 else "one device"


def write_results(writer: SummaryWriter, result: EvalResult, checkpoint_path: str | None) -> None:
    """Writes an evaluation's values at its global step; numbers, small arrays element by element, larger as histograms.

    Args:
      writer: of the evaluation's folder.
      result: what evaluate() returns.
      checkpoint_path: the evaluated checkpoint, written as text.
    """
    step = result["global_step"]
    for name, value in result.items():
        if name != "global_step":
            _write(writer, name, value, step)
    if checkpoint_path is not None:
        writer.text("checkpoint_path", checkpoint_path, step)
    writer.flush()


def _write(writer: SummaryWriter, name: str, value: Any, step: int) -> None:
    if isinstance(value, numbers.Real):
        writer.scalar(name, float(value), step)
    elif isinstance(value, np.ndarray) and value.size and value.dtype.kind in "biuf":
        if value.ndim == 1 and value.size <= _SMALL_ARRAY:
            for i, item in enumerate(value):
                writer.scalar(f"{name}/{i}", float(item), step)
        else:
            writer.histogram(name, value, step)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _write(writer, f"{name}/{key}", item, step)
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            _write(writer, f"{name}/{i}", item, step)
    else:
        logger.warning("no summary is written of %s, a %s.", name, type(value).__name__)
