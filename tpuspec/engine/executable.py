"""A StableHLO program as a function of arrays, compiled for devices by public calls of jax."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import core, export
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from tpuspec.engine.pooling import plain_pooling
from tpuspec.spec.engine import Run

_DTYPES: dict[str, Any] = {
    "f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": jax.numpy.bfloat16, "i1": np.bool_,
    "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64,
    "ui8": np.uint8, "ui16": np.uint16, "ui32": np.uint32, "ui64": np.uint64,
    "complex<f32>": np.complex64, "complex<f64>": np.complex128}

_num_compiles = 0


def num_compiles() -> int:
    """Counts the programs that this process has compiled."""
    return _num_compiles


class Form(NamedTuple):
    """An input of a program.

    Attributes:
      shape, dtype: of one step's.
      place: where it lies.
      place_of_steps: where those of several steps lie, [number of steps, ...].
    """

    shape: tuple[int, ...]
    dtype: Any
    place: Any
    place_of_steps: Any

    def of_step(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.place)

    def of_steps(self, num_steps: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_steps, *self.shape), self.dtype, sharding=self.place_of_steps)


def lower_step(call: Callable[..., Any], forms: Sequence[Form], donated: Sequence[int],
               places: Sequence[Any] | None = None) -> Any:
    """Makes a program ready to be compiled; see `compile_step`."""
    with _donation_may_fail():
        return jax.jit(
            lambda *inputs: tuple(call(*inputs)), donate_argnums=tuple(donated), keep_unused=True,
            out_shardings=None if places is None else tuple(places)).lower(*(form.of_step() for form in forms))


def compile_step(call: Callable[..., Any], forms: Sequence[Form], donated: Sequence[int],
                 places: Sequence[Any] | None = None) -> Run:
    """Compiles a program.

    Args:
      call: the program as a function of arrays, to be traced by jax.
      forms: of the inputs.
      donated: places of the inputs whose buffers the program may write its outputs to; they are gone then.
      places: where each output lies; None where `call` says it.
    """
    global _num_compiles
    _num_compiles += 1
    compiled = lower_step(call, forms, donated, places).compile()

    def run(inputs: Sequence[Any]) -> list[Any]:
        with jax.enable_x64(True):
            return compiled(*inputs)

    return run


def compile_loop(call: Callable[..., Any], forms: Sequence[Form], num_steps: int, carried: Sequence[tuple[int, int]],
                 stacked: Sequence[int], num_outputs: int, places_of_state: Sequence[Any] | None = None,
                 places_of_steps: Sequence[Any] | None = None) -> Run:
    """Compiles a program that runs another one several times, as a loop on the device: it is compiled once.

    Args:
      call: one step.
      forms: of its inputs.
      num_steps: how often it runs.
      carried: (input, output) of the state: each step starts with what the one before has written.
      stacked: places of the inputs that are [num_steps, ...], one for each step; the others are the same in all.
      num_outputs: of one step.
      places_of_state, places_of_steps: where each output lies, by its number in a step: of the state, and of what is
        [num_steps, ...]; None where `call` says it.

    Returns:
      A function from the inputs of one step, with those stacked, to its outputs: the state after the last step, the
      others [num_steps, ...].
    """
    global _num_compiles
    _num_compiles += 1
    lowered, (places, same, results, others) = lower_loop(
        call, forms, num_steps, carried, stacked, num_outputs, places_of_state, places_of_steps)
    compiled = lowered.compile()

    def run(inputs: Sequence[Any]) -> list[Any]:
        made: list[Any] = [None] * num_outputs
        with jax.enable_x64(True):
            state, stacks = compiled(*(tuple([inputs[i] for i in each]) for each in (places, same, stacked)))
        for result, array in zip((*results, *others), (*state, *stacks), strict=True):
            made[result] = array
        return made

    return run


def lower_loop(call: Callable[..., Any], forms: Sequence[Form], num_steps: int, carried: Sequence[tuple[int, int]],
               stacked: Sequence[int], num_outputs: int, places_of_state: Sequence[Any] | None,
               places_of_steps: Sequence[Any] | None) -> tuple[Any, tuple[list[int], ...]]:
    """Makes a loop ready to be compiled; see `compile_loop`.

    Returns:
      The loop, a function of (state, what is the same in all steps, what is another in each); and the places of the
      inputs of the first two, and the numbers of the outputs that are state and that are not.
    """
    places, results = [place for place, _ in carried], [result for _, result in carried]
    same = [place for place in range(len(forms)) if place not in {*places, *stacked}]
    others = [result for result in range(num_outputs) if result not in set(results)]

    def loop(state: Any, rest: Any, each: Any) -> Any:
        def step(state: Any, of_step: Any) -> Any:
            given = dict(zip(places, state, strict=True)) | dict(zip(same, rest, strict=True)) | dict(
                zip(stacked, of_step, strict=True))
            made = call(*(given[place] for place in range(len(given))))
            return tuple(made[result] for result in results), tuple(made[result] for result in others)

        return jax.lax.scan(step, state, each, length=num_steps)

    shardings = None if places_of_state is None or places_of_steps is None else (
        tuple(places_of_state[result] for result in results), tuple(places_of_steps[other] for other in others))
    with _donation_may_fail():
        lowered = jax.jit(loop, donate_argnums=0, keep_unused=True, out_shardings=shardings).lower(
            tuple(forms[place].of_step() for place in places), tuple(forms[place].of_step() for place in same),
            tuple(forms[place].of_steps(num_steps) for place in stacked))
    return lowered, (places, same, results, others)


@contextlib.contextmanager
def _donation_may_fail() -> Iterator[None]:
    """Keeps jax from warning of a donated buffer that no output fits, as of state whose dtype a step changes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        yield


def has_convolutions(artifact: bytes) -> bool:
    """Whether a program convolves."""
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        return "stablehlo.convolution" in str(stablehlo.deserialize_portable_artifact(context, artifact))


def as_exported(artifact: bytes, platform: str) -> export.Exported:
    """Returns a portable StableHLO artifact as what `jax.export` calls a program."""
    if platform == "cpu":
        artifact = plain_pooling(artifact)
    context = mlir.make_ir_context()
    with context, ir.Location.unknown(context):
        module = stablehlo.deserialize_portable_artifact(context, artifact)
        main: Any = next(operation for operation in module.body.operations
                         if operation.operation.attributes["sym_name"] == ir.StringAttr.get("main"))
        given, made = (tuple(map(_aval, types)) for types in (main.type.inputs, main.type.results))
    fields: dict[str, Any] = dict(
        fun_name="step", in_tree=jax.tree.structure((given, {})), in_avals=given, out_tree=jax.tree.structure(made),
        out_avals=made, in_shardings_hlo=(None,) * len(given), out_shardings_hlo=(None,) * len(made),
        _has_named_shardings=False, _in_named_shardings=(None,) * len(given),
        _out_named_shardings=(None,) * len(made), nr_devices=1, platforms=(platform,), ordered_effects=(),
        unordered_effects=(), disabled_safety_checks=(), mlir_module_serialized=artifact,
        module_kept_var_idx=tuple(range(len(given))), uses_global_constants=False,
        calling_convention_version=export.maximum_supported_calling_convention_version, _get_vjp=None)
    known = {field.name for field in dataclasses.fields(export.Exported)}  # versions of jax differ
    return export.Exported(**{name: value for name, value in fields.items() if name in known})


def _aval(given: Any) -> core.ShapedArray:
    tensor = ir.RankedTensorType(given)
    return core.ShapedArray(tuple(tensor.shape), _DTYPES[str(tensor.element_type)])
