"""Programs: model_fn traced by torch.export as a pure function of weights and of what the server receives."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from tpuspec.errors import ExportError, TpuspecError
from tpuspec.export.receiver import Features, tensors_by_name
from tpuspec.export.signature import BATCH, Signature, TensorSpec, kind_of, named_outputs
from tpuspec.spec.export_output import ExportOutput

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]
Served = Callable[[Weights, Any], Mapping[str, ExportOutput]]
"""A function of weights by name, and of what is received, to outputs by the name of their signature."""

# Fused kernels that only one of both takes differ in last bits.
_MOST_RELATIVE, _MOST_ABSOLUTE = 1e-2, 1e-3
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingProgram:
    """What was traced, as it is stored.

    Attributes:
      content: a .pt2 file of torch.export without weights: a function of (weights, what is received) that returns
        {signature: {output: tensor}}. Weights are a dict in the order of their sorted names.
      inputs: name -> what is received.
      signatures: by name.
    """

    content: bytes
    inputs: dict[str, TensorSpec]
    signatures: dict[str, Signature]


class _Function(nn.Module):
    """The function that is traced; holds no tensors.

    Args:
      served: the function.
      copied: names of weights that `served` changes: it gets copies, for a served model has no state.
    """

    def __init__(self, served: Served, copied: frozenset[str]) -> None:
        super().__init__()
        self._served, self._copied = served, copied

    def forward(self, weights: Weights, received: Any) -> dict[str, dict[str, Tensor]]:
        own = {name: tensor.clone() if name in self._copied else tensor for name, tensor in weights.items()}
        return {name: named_outputs(output) for name, output in self._served(own, received).items()}


def trace(served: Served, weights: Weights, received: Features, *, fixed_batch: bool = False) -> ServingProgram:
    """Traces a function, and checks that the program computes what the function does, for several numbers of rows.

    Args:
      served: the function; draws on nothing but its arguments.
      weights: host tensors by name.
      received: an example, [batch, ...].
      fixed_batch: whether the program takes as many rows as the example only.

    Raises:
      ExportError: the function cannot be a program, or the program gives another shape or dtype than the function, or a
        floating output that differs by more than about 1 %, as it may where the function depends on a counter.
      Exception: of the function, as it is.
    """
    weights = {name: weights[name] for name in sorted(weights)}
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    versions = {name: tensor._version for name, tensor in copies.items()}
    with torch.no_grad():
        outputs = served(copies, received)
    kinds = {name: kind_of(output) for name, output in outputs.items()}
    changed = frozenset(name for name, tensor in copies.items() if tensor._version != versions[name])
    if changed:
        logger.info("model_fn changes %s in mode PREDICT; the exported program changes a copy.", sorted(changed))
    example = received if fixed_batch else _repeat_rows(received, 2)  # one row would be taken for a constant
    exported = _export(_Function(served, changed), weights, example, fixed_batch=fixed_batch)
    program = _as_module(exported)
    # The function gets copies of all weights: for these rows it may change others than for the example, and what it is
    # given here is what is exported.
    for rows in (received,) if fixed_batch else (received, _repeat_rows(received, 3), _first_row(received)):
        _check_same(program, _Function(served, frozenset(weights)), weights, rows)
    return ServingProgram(
        content=_encode(exported), signatures=_signatures(exported, kinds, num_inputs=len(tensors_by_name(received))),
        inputs={name: TensorSpec(tensor.dtype, (tensor.shape[0] if fixed_batch else BATCH, *tensor.shape[1:]))
                for name, tensor in tensors_by_name(received).items()})


def _export(function: nn.Module, weights: Weights, received: Features, *, fixed_batch: bool) -> ExportedProgram:
    batch = Dim(BATCH, min=1)
    shapes = None if fixed_batch else (
        {name: None for name in weights},
        {0: batch} if isinstance(received, Tensor) else {name: {0: batch} for name in received})
    try:
        with torch.no_grad():
            return torch.export.export(function, (weights, received), dynamic_shapes=shapes)
    except TpuspecError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "onstraints violated" in str(error):
            raise ExportError(
                "model_fn cannot be exported for any number of rows: in mode PREDICT it computes with a fixed one. "
                "Take it from the features, x.shape[0], or -1 in a reshape; or fix it, ServingInputReceiver(..., "
                f"fixed_batch=True). torch.export says: {first}") from error
        raise ExportError(
            "model_fn in mode PREDICT cannot be traced by torch.export. Python branches on values of tensors, "
            f".item() and numpy cannot be part of a program. It says: {type(error).__name__}: {first}") from error


def _as_module(exported: ExportedProgram) -> nn.Module:
    try:
        return exported.module()
    except Exception as error:
        raise ExportError(
            "what torch.export has traced cannot be called. It writes the names of modules and features into Python "
            "code, where a quotation mark ends them: rename what has one. It says: "
            f"{type(error).__name__}: {error}") from error


def _check_same(program: Callable[..., Any], function: nn.Module, weights: Weights, received: Features) -> None:
    results = []
    for compute in (program, function):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            results.append(compute(weights, received))
    got, expected = (_flatten(result) for result in results)
    for name, value in expected.items():
        other = got[name]
        if (other.shape, other.dtype) != (value.shape, value.dtype):
            raise ExportError(f"the exported program gives {name} as {other.dtype} {list(other.shape)}, and model_fn "
                              f"as {value.dtype} {list(value.shape)}. {_DEPENDS}")
        if not value.is_floating_point():
            # Not refused: an argmax among scores that are equal to the last bits may be another index.
            if not torch.equal(other, value):
                logger.warning("the exported program gives another %s than model_fn for some rows. %s", name, _DEPENDS)
        elif not _is_close(other.double(), value.double()):
            raise ExportError(f"the exported program gives another {name} than model_fn, by up to "
                              f"{(other.double() - value.double()).abs().max():.3g}. {_DEPENDS}")


_DEPENDS = "Does it depend on something besides its arguments, such as a counter, the time or Python's random?"


def _is_close(value: Tensor, expected: Tensor) -> bool:
    finite = expected[expected.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    return torch.allclose(value, expected, rtol=_MOST_RELATIVE, atol=_MOST_ABSOLUTE * scale, equal_nan=True)


def _flatten(outputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{signature}.{name}": tensor for signature, named in outputs.items() for name, tensor in named.items()}


def _signatures(exported: ExportedProgram, kinds: Mapping[str, str], *, num_inputs: int) -> dict[str, Signature]:
    graph = exported.graph_module.graph
    batch = str([node for node in graph.nodes if node.op == "placeholder"][-num_inputs].meta["val"].shape[0])
    values = [node.meta["val"] for node in graph.output_node().args[0]]  # type: ignore[union-attr]
    user_values = values[len(values) - len(exported.graph_signature.user_outputs):]
    assert exported.call_spec.out_spec is not None
    outputs = pytree.tree_unflatten(user_values, exported.call_spec.out_spec)

    def spec(value: Tensor) -> TensorSpec:
        return TensorSpec(value.dtype, tuple(
            size if isinstance(size, int) else BATCH if str(size) == batch else None for size in value.shape))

    return {signature: Signature(kind=kinds[signature], outputs={name: spec(value) for name, value in named.items()})
            for signature, named in outputs.items()}


def _encode(exported: ExportedProgram) -> bytes:
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of the machine that exported
    exported.example_inputs = None  # they would be stored as a pickle, the weights among them
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


def _repeat_rows(received: Features, times: int) -> Any:
    return pytree.tree_map(lambda tensor: torch.cat([tensor] * times), received)


def _first_row(received: Features) -> Any:
    return pytree.tree_map(lambda tensor: tensor[:1], received)
