"""Compiles torch's operations for a TPU that is not there, and writes docs/tpu_operations.md: those that it refuses.

    make tpu-operations                                    all, in some minutes
    make tpu-operations ARGS="linalg.svd nn.functional.celu"    some; writes nothing

A sample of each operation of torch's own list (op_db), forward and backward, is traced as in a step and compiled by
libtpu, many at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.operations import samples

TOPOLOGY = "v5e:2x2"
NUM_AT_ONCE = 24
PAGE = Path(__file__).resolve().parents[2] / "docs" / "tpu_operations.md"
_HEAD = f"""\
# Operations on a TPU

`make tpu-operations` wrote this page: one sample of each operation of torch's own list (`op_db`), forward and backward,
traced as in a step and compiled by libtpu for {TOPOLOGY}. Nothing ran: values are compared on the CPU
([operations.md](operations.md)). The dtype is float32, or the first one that the operation has.

- **compiles**: the TPU's compiler takes it.
- **refused**: the TPU's compiler does not. `mode=plan` and the first step say so with this reason.
- **ended the process**: the TPU's compiler stopped the process.
- **host**: torch_xla computes it on the host, so that nothing of it is left for the device.
- **nothing to compute**: its results are its inputs, or values that are known while it is traced, or were read.
- **not traced**: torch_xla does not have it; see [operations.md](operations.md).

"""
_OUTCOMES = ("compiles", "refused", "ended the process", "host", "nothing to compute", "not traced")


def variants() -> list[tuple[int, str]]:
    """Returns the number of each operation with one dtype."""
    return [(number, next(dtype for dtype in samples.DTYPES if getattr(torch, dtype) in op.dtypes))
            for number, op in enumerate(samples.op_db)
            if not op.name.startswith("jiterator") and any(getattr(torch, dtype) in op.dtypes
                                                           for dtype in samples.DTYPES)]


class Compiler:
    """Compiles programs for TOPOLOGY."""

    def __init__(self) -> None:
        from tpuspec.engine.topologies import TopologyEngines

        self._engine: Any = TopologyEngines(TOPOLOGY).make(1)

    def refused(self, programs: Sequence[bytes]) -> str:
        """Returns the reason for which the compiler refuses programs, compiled as one; "" where it takes them."""
        import jax

        from tpuspec.engine.executable import as_exported, lower_step
        from tpuspec.spec.engine import WHOLE

        exported = [as_exported(program, "tpu") for program in programs]
        ends = list(itertools.accumulate(len(one.in_avals) for one in exported))

        def call(*inputs: Any) -> Any:
            return [made for one, end in zip(exported, ends, strict=True)
                    for made in one.call(*inputs[end - len(one.in_avals):end])]

        with jax.enable_x64(True):
            forms = [form for one in exported for form in self._engine._forms(one, [WHOLE] * len(one.in_avals))]
            try:
                lower_step(call, forms, []).compile()
            except jax.errors.JaxRuntimeError as error:
                return str(error) or "no reason"
        return ""

    def outcomes(self, programs: Mapping[int, bytes]) -> dict[int, str]:
        """Returns for each program why it is refused, or ""; compiles many at once, for each compilation costs."""
        reason = self.refused(list(programs.values()))
        if not reason or len(programs) == 1:
            return dict.fromkeys(programs, reason)
        keys = list(programs)
        return {key: found for half in (keys[:len(keys) // 2], keys[len(keys) // 2:])
                for key, found in self.outcomes({key: programs[key] for key in half}).items()}


def trace(number: int, dtype: str, device: torch.device) -> tuple[bytes, str]:
    """Returns the program of a sample of one operation, forward and backward, or b"", and what the operation is then.

    What it is: 'not traced: <why>', 'host: <operation>' or 'nothing to compute'.
    """
    from tpuspec.tracer import graph
    from tpuspec.tracer.host_reads import new_host_op

    op, kind = samples.op_db[number], getattr(torch, dtype)
    with_gradient = op.supports_autograd and kind in op.supported_backward_dtypes("cpu") and kind.is_floating_point
    torch.manual_seed(0)
    host_ops = graph.host_ops()
    try:
        drawn = list(itertools.islice(op.sample_inputs("cpu", kind, requires_grad=with_gradient), 10))
        # Among the first ones, which are not the odd ones, that of the most dims which is not empty.
        sample = max(drawn[:len(drawn) // 2 + 1], key=_size)
        traced = samples.run_sample(op, sample, samples.moved(sample, device), device)
        tensors = [leaf for leaf in pytree.tree_leaves(traced)
                   if isinstance(leaf, Tensor) and leaf.device.type == "xla" and leaf.layout is torch.strided]
        roots = list({graph.tensor_id(tensor): tensor for tensor in graph.waiting(tensors)}.values())
        if roots:
            return graph.stablehlo(roots), ""
        op = new_host_op(host_ops)
        return b"", "nothing to compute" if op is None else f"host: {op}"
    except Exception as error:
        return b"", f"not traced: {samples.short(error)}"
    finally:
        graph.forget_pending(str(device))


def _size(sample: Any) -> tuple[bool, int]:
    """Returns whether a sample of an operation has elements, and how many dims."""
    given = [leaf for leaf in pytree.tree_leaves(sample.input) if isinstance(leaf, Tensor)]
    return all(leaf.numel() for leaf in given), sum(leaf.ndim for leaf in given)


def compile_group(compiler: Compiler, group: Sequence[tuple[int, str]], device: torch.device) -> list[dict[str, Any]]:
    """Returns how each operation comes out."""
    traced = {number: trace(number, dtype, device) for number, dtype in group}
    reasons = compiler.outcomes({number: program for number, (program, _) in traced.items() if program}) if any(
        program for program, _ in traced.values()) else {}
    found = []
    for number, dtype in group:
        if number in reasons:
            outcome, why = "refused" if reasons[number] else "compiles", _told(reasons[number])
        else:
            outcome, _, why = traced[number][1].partition(": ")
        found.append({"variant": [number, dtype], "outcome": outcome, "why": why})
    return found


def _told(reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return lines[0].removeprefix("INTERNAL: ").replace("|", "/")[:140] if lines else ""


def compile_all(variants: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """Compiles in a process of its own, which is started anew where the compiler ends it."""
    results: list[dict[str, Any]] = []
    groups = [list(variants[i:i + NUM_AT_ONCE]) for i in range(0, len(variants), NUM_AT_ONCE)]
    while groups:
        process = subprocess.Popen([sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "PJRT_DEVICE": "CPU", "NPROC": "32"})
        assert process.stdin is not None and process.stdout is not None
        while groups:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(groups[0]) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                break
            groups.pop(0)
            results += json.loads(line)
            print(f"{len(results)} of {len(variants)}", file=sys.stderr, flush=True)
        process.kill()
        process.wait()
        if groups and len(groups[0]) > 1:
            groups[:1] = [[variant] for variant in groups[0]]
        elif groups:
            ((number, dtype),) = groups.pop(0)
            results.append({"variant": [number, dtype], "outcome": "ended the process", "why": ""})
    return results


def page(results: list[dict[str, Any]]) -> str:
    """Returns docs/tpu_operations.md."""
    counts = Counter(result["outcome"] for result in results)
    lines = [_HEAD, f"| operations | {' | '.join(_OUTCOMES)} |", "| --: " * (len(_OUTCOMES) + 1) + "|",
             f"| {len(results)} | {' | '.join(str(counts[outcome]) for outcome in _OUTCOMES)} |", "",
             "| operation | dtype | outcome | reason |", "| :-- | :-- | :-- | :-- |"]
    lines += [f"| `{result['name']}` | {result['variant'][1]} | {result['outcome']} | {result['why']} |"
              for result in sorted(results, key=lambda result: (_OUTCOMES.index(result["outcome"]), result["name"]))
              if result["outcome"] in ("refused", "ended the process", "host", "not traced")]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compiles, and writes the page, or prints what the named operations do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", help="names of op_db, with or without their variant")
    asked = parser.parse_args().operations
    chosen = [(number, dtype) for number, dtype in variants() if not asked or not {
        samples.op_db[number].name, samples.name_of(samples.op_db[number])}.isdisjoint(asked)]
    results = compile_all(chosen)
    for result in results:
        result["name"] = samples.name_of(samples.op_db[result["variant"][0]])
        if asked:
            print(result["name"], result["variant"][1], result["outcome"], result["why"], sep=", ")
    if not asked and len(results) == len(chosen):
        PAGE.write_text(page(results))
    sys.exit(len(results) < len(chosen))


def work() -> None:
    """Compiles the groups of the input, one after another."""
    warnings.simplefilter("ignore")
    import torch_xla

    from tpuspec.tracer.formulas import register_formulas
    from tpuspec.tracer.kernels import register_kernels

    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # C++ writes there too
    torch.autograd.set_multithreading_enabled(False)
    register_formulas()
    register_kernels()
    compiler, device = Compiler(), torch_xla.device()
    for line in sys.stdin:
        results.write(json.dumps(compile_group(compiler, json.loads(line), device)) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        main()
