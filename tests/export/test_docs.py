"""docs/export.md keeps its promises: its example runs, and serves what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text()
EXAMPLE, PLAIN = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_example_runs_and_torch_alone_serves_the_same(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(f"{EXAMPLE}\nfrom safetensors.torch import load_file\n{PLAIN}\n"
                      "assert outputs['class'].tolist() == model({'pixels': torch.zeros(2, 8)})['class'].tolist()\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["float32 [batch, 8] int64 [batch] 200", "tensor([1, 1, 1])"]
    assert [path.name for path in (tmp_path / "run" / "export").iterdir()] == ["best"]
