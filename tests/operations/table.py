"""The page docs/operations.md, made of results of `compare`."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

FAULTS = ("wrong", "ended the process")
_COLUMNS = ("right", "partly", "refused", "missing", "slow", "wrong", "ended the process")
_HEAD = """\
# Operations

`make operations` wrote this page: each operation of torch on XLA, beside the same operation on the CPU.

What is compared: torch's own samples of each operation (`op_db`, which torch's tests use), at most four of each,
spread over all of them, in each dtype that the CPU has it in. The outputs, the gradients of all inputs for an output
gradient of many different values, and the inputs as they are afterwards, in dtype, shape and value. float32 and
complex64 may differ by 1e-3 of the value and 1e-4, bfloat16 by 0.04, or by more where the device is as near to the
result in double precision as the CPU is. tpuspec's own formulas are on, as they are once a Trainer has made its
backend, since some of XLA's are not torch's.

- **right**: all samples are.
- **partly**: some samples are right, the others are refused.
- **refused**: an error in place of a result; **missing**: torch_xla does not have it. `use_tpu=False` has both.
- **slow**: a sample took more than 20 s.
- **wrong**: another result, without a word. None may be.
- **ended the process**: no error that Python can catch. None may.

Not compared: which one of equal elements `topk`, `cummax` and the like name (both are held to name an equal one); signs
of the factors of `qr`, `svd` and `eigh`; values that depend on the seed (their form is compared); what `empty` holds.

"""


def page(results: list[dict[str, Any]]) -> str:
    """Returns the page."""
    tried = [result for result in results if result["outcome"] != "untried"]
    dtypes = list(dict.fromkeys(result["variant"][1] for result in tried))
    lines = [_HEAD, "## Numbers", "", _row("dtype", "operations", "samples", *_COLUMNS),
             "| :-- |" + " --: |" * (len(_COLUMNS) + 2)]
    for dtype in [*dtypes, "all"]:
        own = [result for result in tried if dtype in (result["variant"][1], "all")]
        counts = Counter(result["outcome"] for result in own)
        lines.append(_row(dtype, len(own), sum(result.get("samples", 0) for result in own),
                          *(counts[column] for column in _COLUMNS)))
    lines += ["", "## Operations that are not right everywhere", "",
              _row("operation", "dtypes", "outcome", "first reason"), "| :-- | :-- | :-- | :-- |"]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for result in sorted(tried, key=lambda result: (result["name"], dtypes.index(result["variant"][1]))):
        if result["outcome"] != "right":
            groups.setdefault((result["name"], result["outcome"], _reason(result)), []).append(result["variant"][1])
    lines += [_row(f"`{name}`", ", ".join(found), outcome, reason) for (name, outcome, reason), found in groups.items()]
    return "\n".join(lines) + "\n"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _reason(result: dict[str, Any]) -> str:
    text = re.sub(r"\s+", " ", result["why"]).replace("|", "/").replace("<", "(").replace(">", ")")
    return text if len(text) <= 140 else text[:137] + "..."
