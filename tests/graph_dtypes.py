"""Reads, from the HLO text of the steps that are traced for capture, which dtypes each part of a step has."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

Dtypes = dict[str, set[str]]
"""Part of a step, as docs/precision.md names it -> dtypes in HLO's names, such as 'f32' and 'bf16'."""

_SHAPE = r"(\w+)\[[\d,<=]*\]"
_PARTS = {"parameter": "parameters", "buffer": "float buffers", "batch": "floats of the batch", "gradient": "gradients"}
_FLOATS = {"f16", "bf16", "f32", "f64"}


def note_dtypes(monkeypatch: pytest.MonkeyPatch) -> Dtypes:
    """Returns a dict to which every step that is traced adds the dtypes of its graph's floats."""
    import torch_xla

    from tpuspec.tracer import capture

    noted: Dtypes = defaultdict(set)
    compile_recording = capture.compile_recording

    def noting(recording, device, runtime):
        for part, dtypes in _read(torch_xla._XLAC._get_xla_tensors_hlo(list(recording.roots)), recording).items():
            noted[part] |= dtypes & _FLOATS
        compile_recording(recording, device, runtime)
        if sums := _read_sums(recording.compiled.program) if recording.compiled.program else None:
            noted["gradients while they are summed over replicas"] |= sums & _FLOATS

    monkeypatch.setattr(capture, "compile_recording", noting)
    return noted


def _read(hlo: str, recording) -> Dtypes:
    """Returns the dtypes of a graph's inputs by what they are, of its outputs, products and reductions."""
    entry = hlo[hlo.index("ENTRY"):]
    dtypes: Dtypes = defaultdict(set)
    parameters = {int(number): dtype for dtype, number in re.findall(rf"= {_SHAPE}\S* parameter\((\d+)\)", entry)}
    assert len(parameters) == len(recording.inputs), "one parameter of the graph for each input"
    for place, source in enumerate(recording.inputs):
        part = _part_of_slot(source.key) if source.kind == "slot" else _PARTS.get(source.kind, source.kind)
        dtypes[part].add(parameters[place])
    outputs = re.findall(_SHAPE, re.search(r"ROOT \S+ = (.*?) tuple\(", entry)[1])
    assert len(outputs) == len(recording.roots)
    for slot, dtype in zip(recording.written, outputs, strict=False):
        dtypes[_part_of_slot(slot)].add(dtype)
    # The loss is the first tensor for the host.
    dtypes["loss, a cross entropy"].add(outputs[recording.sources[0].key])
    products = re.findall(rf"= {_SHAPE}\S* (?:dot|convolution)\((\w+)\[\S* \S+ (\w+)\[", entry)
    dtypes["matrix products and convolutions"] = {dtype for product in products for dtype in product}
    return dtypes


def _read_sums(program: bytes) -> set[str]:
    """Returns the dtypes in which a program of replicas sums."""
    from jax.interpreters import mlir
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    from tpuspec.engine.collectives import over_replicas

    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        text = str(stablehlo.deserialize_portable_artifact(context, over_replicas(program, 2)))
    return set(re.findall(r"all_reduce.*?\}\) : \(tensor<(?:\d+x)*(\w+)>\)", text, re.DOTALL))


def _part_of_slot(slot) -> str:
    if slot.kind == "optimizer":
        return "optimizer's step count" if slot.key == "step" else "optimizer's moments"
    return _PARTS.get(slot.kind, slot.kind)
