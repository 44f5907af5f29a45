# pyright: reportPossiblyUnbound=false, reportPossiblyUnboundVariable=false
"""Torch's own samples of each operation, run on XLA and on the CPU, forward and backward.

    python tests/operations/samples.py RESULTS < VARIANTS

Each line of the input is a JSON list of an operation's number in op_db and a dtype. Each result is one JSON line, with
a line before it that says which is begun, so that a process that C++ ends shows where.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

NUM_SAMPLES = 4
SECONDS_A_SAMPLE = 20
DTYPES = ("float32", "bfloat16", "complex64", "int64", "int32", "uint8", "bool")

NOT_SET = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_",
           "resize_as_"}
"""Their values are what the memory held."""

SIGNS = {"qr", "linalg.qr"}
"""Each library chooses the signs of their factors. (op_db's own samples take them out of svd, eig and eigh.)"""
PLACES = {"cummax": 0, "cummin": 0, "kthvalue": 1, "topk": 1, "max.reduction_with_dim": 0, "min.reduction_with_dim": 0,
          "mode": 0, "median": 0, "nanmedian": 0, "sort": 0, "argsort": 0, "argmax": 0, "argmin": 0}
"""Operations that tell where elements are, with the place of `dim`: of equal elements each library chooses one."""
SEEDS = (0, 1, 2)
DRAWN = {"bernoulli"}
"""Its values depend on the seed, though few draws may be equal."""

_TOLERANCES = {torch.bfloat16: (4e-2, 4e-2), torch.float32: (1e-3, 1e-4), torch.complex64: (1e-3, 1e-4)}


class OutOfTime(Exception):
    """A sample took too long."""


def name_of(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def variants() -> list[tuple[int, str]]:
    """Returns the number of each operation with each dtype that torch has it in on the CPU."""
    return [(number, dtype) for dtype in DTYPES for number, op in enumerate(op_db)
            if getattr(torch, dtype) in op.dtypes and not op.name.startswith("jiterator")]


def run_variant(op: Any, dtype: torch.dtype, device: torch.device, num_samples: int = NUM_SAMPLES) -> dict[str, Any]:
    """Returns how the samples of an operation come out, as the worst one: wrong, refused, missing, right or untried."""
    with_gradient = op.supports_autograd and (dtype.is_floating_point or dtype.is_complex) and (
        dtype in op.supported_backward_dtypes("cpu"))
    torch.manual_seed(0)
    try:
        with _time_limit():
            samples = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=with_gradient), 60))
    except Exception as error:
        return {"outcome": "untried", "why": short(error)}
    samples = samples[::max(1, -(-len(samples) // num_samples))]
    outcomes: list[tuple[str, str]] = []
    for sample in samples:
        with contextlib.suppress(_NoReference):
            outcomes.append(_compare_sample(op, sample, dtype, device))
    if not outcomes:
        return {"outcome": "untried", "why": "the CPU has none of the samples"}
    order = ("wrong", "slow", "refused", "missing", "right")
    outcome, why = min(outcomes, key=lambda outcome: order.index(outcome[0]))
    if outcome in ("refused", "missing") and any(one[0] == "right" for one in outcomes):
        outcome, why = "partly", why
    return {"outcome": outcome, "why": why, "samples": len(outcomes)}


class _NoReference(Exception):
    """The CPU does not compute this sample."""


def _run_on_cpu(op: Any, sample: Any) -> tuple[Any, bool]:
    """Returns the results, and whether they depend on the seed: then only shapes and dtypes can be compared."""
    cpu = torch.device("cpu")
    try:
        with _time_limit():
            results = [run_sample(op, sample, moved(sample, cpu), cpu, seed) for seed in SEEDS]
    except Exception as error:
        raise _NoReference from error
    return results[0], any(_difference(results[0], other, exact=True) for other in results[1:])


def _compare_sample(op: Any, sample: Any, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    wanted, random = _run_on_cpu(op, sample)
    try:
        with _time_limit():
            got = run_sample(op, sample, moved(sample, device), device)
            difference = _difference(wanted, got, forms_only=random or name_of(op) in NOT_SET | DRAWN)
            if difference and "value" in difference and dtype in _TOLERANCES and _is_nearer(op, sample, wanted, got):
                difference = ""
    except OutOfTime:
        return "slow", f"more than {SECONDS_A_SAMPLE} s"
    except NotImplementedError as error:
        return "missing", short(error)
    except Exception as error:
        return "refused", short(error)
    return ("wrong", f"{difference}; {_describe(sample)}") if difference else ("right", "")


def run_sample(op: Any, sample: Any, inputs: tuple[Any, tuple[Any, ...], dict[str, Any]], device: torch.device,
         seed: int = 0) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns the outputs, the gradients of the inputs, and the inputs as they are afterwards."""
    torch.manual_seed(seed)
    first, arguments, keywords = inputs
    if "device" in keywords:
        keywords = {**keywords, "device": device}
    with mock.patch.object(torch, "manual_seed"):  # some operations of op_db set a seed of their own
        out = sample.output_process_fn_grad(op(first, *arguments, **keywords))
    if name_of(op) in SIGNS:
        out = pytree.tree_map(torch.abs, out)
    outputs = [leaf for leaf in pytree.tree_leaves(out) if leaf is not None]
    leaves = _tensors(inputs)
    differentiable = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    gradients: list[Any] = []
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    if differentiable and needed:
        gradients = list(torch.autograd.grad(
            differentiable, needed, [_weights(leaf) for leaf in differentiable], allow_unused=True))
    if name_of(op) in PLACES and outputs and outputs[-1].dtype is torch.int64 and outputs[-1].numel():
        outputs[-1] = _elements_at(outputs[-1], first, arguments, keywords, PLACES[name_of(op)])
    return outputs, gradients, [leaf.detach() for leaf in leaves]


def _elements_at(places: Tensor, first: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any],
                 position: int) -> Tensor:
    dim = keywords.get("dim", arguments[position] if len(arguments) > position else None)
    values, places = first.detach().cpu(), places.cpu()
    if places.ndim == 0:
        return values.reshape(-1)[places]
    dim = -1 if dim is None else dim
    return values.take_along_dim(places if places.ndim == values.ndim else places.unsqueeze(dim), dim)


def _weights(like: Tensor) -> Tensor:
    """Returns an output's gradient, of many different values."""
    ramp = torch.arange(like.numel(), dtype=torch.float32).reshape(like.shape)
    weights = torch.complex(torch.cos(ramp), torch.sin(2 * ramp)) if like.is_complex() else torch.cos(ramp) + 0.25
    return weights.to(like.dtype).to(like.device)


def _difference(wanted: Any, got: Any, *, forms_only: bool = False, exact: bool = False) -> str:
    """Returns the first difference of results of `run_sample`, or ''."""
    for part, ours, theirs in zip(("output", "gradient", "input afterwards"), wanted, got, strict=True):
        if not theirs and all(one is None or (isinstance(one, Tensor) and not one.numel()) for one in ours):
            continue  # gradients of nothing
        if len(ours) != len(theirs):
            return f"{part}s: {len(theirs)} in place of {len(ours)}"
        for want, have in zip(ours, theirs, strict=True):
            if difference := _difference_of_one(want, have, forms_only, exact):
                return f"{part}: {difference}"
    return ""


def _difference_of_one(want: Any, have: Any, forms_only: bool, exact: bool) -> str:
    if want is None and isinstance(have, Tensor) and have.numel() == 0:
        return ""  # a gradient of nothing
    if not isinstance(want, Tensor):
        if (want is None) != (have is None):
            return f"{have} in place of {want}"
        same = want == have or (isinstance(want, float) and abs(want - have) <= 1e-3 * abs(want) + 1e-4)
        return "" if same or forms_only or want != want else f"value {have} in place of {want}"
    if not isinstance(have, Tensor):
        return f"{type(have).__name__} in place of a tensor"
    if have.dtype != want.dtype:
        return f"dtype {have.dtype} in place of {want.dtype}"
    if have.shape != want.shape:
        return f"shape {list(have.shape)} in place of {list(want.shape)}"
    host = have.detach().cpu()
    if host.dtype != want.dtype:
        return f"dtype {host.dtype} in place of {want.dtype} on the host"
    if host.shape != want.shape:
        return f"shape {list(host.shape)} in place of {list(want.shape)} on the host"
    if forms_only or want.layout is not torch.strided:
        return ""
    a, b = _wide(want), _wide(host)
    if exact:
        return "" if bool(torch.isclose(a, b, 0, 0, equal_nan=True).all()) else "value"
    rtol, atol = _TOLERANCES.get(want.dtype, (1e-3, 1e-4))
    if want.dtype is torch.bfloat16 and a.numel():
        finite = a[torch.isfinite(torch.view_as_real(a)).all(-1)]
        atol *= max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
    close = torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    if bool(close.all()):
        return ""
    place = tuple(int(i) for i in (~close).nonzero()[0])
    return f"value {host[place].item()} in place of {want.detach()[place].item()}"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().to(torch.complex128)


def _is_nearer(op: Any, sample: Any, wanted: Any, got: Any) -> bool:
    """Tells whether the device is as near to the result in double precision as the CPU is, where both round."""
    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        to = torch.complex128 if leaf.is_complex() else torch.float64 if leaf.is_floating_point() else leaf.dtype
        return leaf.detach().to(to).requires_grad_(leaf.requires_grad)

    try:
        inputs = pytree.tree_map(widen, (sample.input, sample.args, sample.kwargs))
        exact = run_sample(op, sample, inputs, torch.device("cpu"))
    except Exception:
        return False
    for true, ours, theirs in zip(exact, wanted, got, strict=True):
        for t, a, b in zip(true, ours, theirs, strict=True):
            if not isinstance(t, Tensor) or not isinstance(a, Tensor) or t.shape != a.shape:
                continue
            t, a, b = _wide(t), _wide(a), _wide(b.detach().cpu())
            errors = (a - t).abs()
            most = torch.nan_to_num(errors, nan=0.0, posinf=0.0).max() if errors.numel() else 0.0
            if not bool(((b - t).abs() <= 2 * torch.clamp(errors, min=most) + 4e-3 * t.abs() + 1e-6).all()):
                return False
    return True


def moved(sample: Any, device: torch.device) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    known: dict[int, Tensor] = {}

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in known:
            known[id(leaf)] = leaf.detach().clone().to(device).requires_grad_(leaf.requires_grad)
        return known[id(leaf)]

    return pytree.tree_map(move, (sample.input, sample.args, sample.kwargs))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _describe(sample: Any) -> str:
    def told(leaf: Any) -> Any:
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if isinstance(leaf, Tensor) else leaf

    return str(pytree.tree_map(told, (sample.input, sample.args, sample.kwargs)))[:200]


def short(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:160]


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_A_SAMPLE)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> None:
    """Runs the variants of the input, one after another."""
    os.environ["PJRT_DEVICE"] = "CPU"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import torch_xla
    if not os.environ.get("WITHOUT_TPUSPEC"):
        from tpuspec.tracer.formulas import register_formulas
        from tpuspec.tracer.kernels import register_kernels
        register_formulas()
        register_kernels()
    device = torch_xla.device()
    with open(sys.argv[1], "a", buffering=1) as results:
        for line in sys.stdin:
            number, dtype = json.loads(line)
            op = op_db[number]
            results.write(json.dumps({"begin": [number, dtype]}) + "\n")
            result = run_variant(op, getattr(torch, dtype), device)
            results.write(json.dumps({"variant": [number, dtype], "name": name_of(op), **result}) + "\n")


if __name__ == "__main__":
    main()
