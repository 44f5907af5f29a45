"""What the evaluations of a run have given so far, as their folder's log has it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tpuspec.errors import ConfigError
from tpuspec.files.location import is_remote
from tpuspec.summary.jsonl import FILE_NAME

History = dict[int, dict[str, float]]
"""Global step -> metric name -> value, in ascending order of steps."""


def read_eval_metrics(eval_dir: str | os.PathLike[str]) -> History:
    """Reads the numbers that evaluations have written; of one step the last ones.

    Args:
      eval_dir: folder of the evaluations, model_dir/eval or model_dir/eval_<name>.

    Returns:
      The history; {} where nothing was evaluated. Torn lines, of a killed process, are passed over.

    Raises:
      ConfigError: it is an address, where no such log is kept.
    """
    if is_remote(eval_dir):
        raise ConfigError(f"the history of evaluations is read from {FILE_NAME}, which is kept in folders of this "
                          f"machine only; got {os.fspath(eval_dir)!r}.")
    found: History = {}
    try:
        lines = (Path(eval_dir) / FILE_NAME).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for line in lines:
        try:
            record = json.loads(line)
            if "value" in record:
                found.setdefault(int(record["step"]), {})[str(record["name"])] = float(record["value"])
        except (ValueError, TypeError, KeyError):
            continue
    return dict(sorted(found.items()))
