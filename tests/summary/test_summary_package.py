import subprocess
import sys

from tpuspec import summary


def test_public_names_are_sorted_and_exist():
    assert summary.__all__ == sorted(summary.__all__)
    assert all(hasattr(summary, name) for name in summary.__all__)


def test_import_loads_neither_tensorboard_nor_rich():
    code = ("import sys, tpuspec.summary as s; s.create_file_writer('unused'); "
            "print([m for m in sys.modules if m.split('.')[0] in ('tensorboard', 'rich', 'torch_xla')])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
