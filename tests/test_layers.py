"""Imports run downhill, torch_xla lives in tpuspec/tracer only, and jax in tpuspec/engine only."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BASE = {"errors", "files", "cluster", "config", "mesh", "precision", "spec"}
DEVICES = {"placement", "hosts"}  # what the ways to run a step share
MIDDLE = {*DEVICES, "tracer", "engine", "native", "data", "drain", "summary", "checkpoint", "export", "plan"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "cluster": {"errors"},
    "mesh": {"errors"},
    "files": {"errors"},
    "precision": {"errors"},
    "config": {"errors", "cluster", "mesh", "precision"},
    "spec": {"errors", "precision"},
    "metrics": {"errors", "spec"},
    "trainer_arguments": BASE,
    **{layer: BASE for layer in MIDDLE},
    "tracer": BASE | DEVICES,
    "native": BASE | DEVICES,
    "loops": BASE | MIDDLE,
    "schedule": BASE | MIDDLE | {"loops"},
    "select": BASE | MIDDLE,  # where the tracer meets its engine
    "trainer": BASE | MIDDLE | {"trainer_arguments", "loops", "schedule", "select"},
    "cli": BASE | MIDDLE,
}
# "tpuspec" stands for the package's own __init__, which imports the trainer.
LAYERS = {*MAY_IMPORT, "train", "testing", "__init__", "tpuspec"}
MAY_IMPORT |= {
    "testing": LAYERS - {"trainer", "train", "tpuspec"},
    "recipes": LAYERS,  # a user's code
    "train": LAYERS,
    "__init__": LAYERS,
}
HOMES = {"torch_xla": "tracer", "jax": "engine", "jaxlib": "engine"}
IMPORTERS = {"import_module", "__import__"}
TORCH_XLA_MODULE = re.compile(r"torch_xla(\.\w+)+")


def modules(package: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """Yields (path for messages, dotted name of the package that holds the module, its tree)."""
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package.parent)
        yield relative.as_posix(), ".".join(relative.parent.parts), ast.parse(path.read_text("utf-8"), str(path))


def layer_of(path: str) -> str:
    return Path(path).parts[1].removesuffix(".py")


def absolute(name: str, level: int, package: str) -> str:
    """Resolves a relative import, of `level` leading dots, made by a module of `package`."""
    if level == 0:
        return name
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])])


def literal_start(node: ast.expr) -> str | None:
    """Returns the text that a string expression starts with, where the source shows it."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=[first, *_]):
            return literal_start(first)
        case ast.BinOp(left=left, op=ast.Add() | ast.Mod()):
            return literal_start(left)
        case _:
            return None


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of every import: at any depth, for type checking only, and by importlib."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                source = absolute(module or "", level, package)
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in names)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]) if name in IMPORTERS:
                text = literal_start(first) or ""
                name = text.lstrip(".")
                yield node.lineno, absolute(name, len(text) - len(name), package)
            case ast.Constant(value=str(text)) if TORCH_XLA_MODULE.fullmatch(text):
                yield node.lineno, text


def layer_named(name: str) -> str | None:
    """Returns the layer that a dotted name belongs to; None outside tpuspec."""
    top, _, rest = name.partition(".")
    if top != "tpuspec":
        return None
    layer = rest.split(".")[0]
    return layer if layer in LAYERS else "tpuspec"


def violations(package: Path) -> list[str]:
    found = []
    for path, holder, tree in modules(package):
        layer = layer_of(path)
        if layer not in MAY_IMPORT:
            found.append(f"{path}: layer {layer!r} is not in MAY_IMPORT: give it its place there")
            continue
        allowed = MAY_IMPORT[layer] | {layer, None}
        for line, name in imported(tree, holder):
            target = layer_named(name)
            if target not in allowed:
                found.append(f"{path}:{line}: {layer} must not import {target} ({name})")
            home = HOMES.get(name.split(".")[0])
            if home is not None and layer != home:
                found.append(f"{path}:{line}: only tpuspec/{home} may import {name.split('.')[0]} ({name})")
    return found


def test_imports_run_downhill():
    assert violations(ROOT / "tpuspec") == []


def test_every_module_is_looked_at():
    looked_at = {path for path, _, _ in modules(ROOT / "tpuspec")}
    assert {"tpuspec/__init__.py", "tpuspec/errors.py", "tpuspec/spec/backend.py"} <= looked_at


def made_up_package(folder: Path, path: str, source: str) -> Path:
    file = folder / "tpuspec" / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    return folder / "tpuspec"


@pytest.mark.parametrize(("path", "source", "complaint"), [
    ("errors.py", "import tpuspec.config", "errors must not import config"),
    ("spec/mode.py", "from tpuspec.config import RunConfig", "spec must not import config"),
    ("drain/drain.py", "from tpuspec.data.padding import pad", "drain must not import data"),
    ("drain/drain.py", "from tpuspec import data", "drain must not import data"),
    ("drain/drain.py", "from ..data import padding", "drain must not import data"),
    ("drain/drain.py", "from .. import loops", "drain must not import loops"),
    ("drain/drain.py", "import tpuspec", "drain must not import tpuspec"),
    ("drain/drain.py", "from tpuspec import Trainer", "drain must not import tpuspec"),
    ("drain/drain.py", "def f():\n    from tpuspec.loops import step", ":2: drain must not import loops"),
    ("drain/drain.py", "if TYPE_CHECKING:\n    import tpuspec.loops.step", ":2: drain must not import loops"),
    ("drain/drain.py", "importlib.import_module('tpuspec.loops.step')", "drain must not import loops"),
    ("drain/drain.py", "importlib.import_module('..loops.step', __package__)", "drain must not import loops"),
    ("drain/drain.py", "import_module(f'tpuspec.loops.{name}')", "drain must not import loops"),
    ("drain/drain.py", "__import__('tpuspec.loops.' + name)", "drain must not import loops"),
    ("loops/train.py", "from tpuspec.schedule import history", "loops must not import schedule"),
    ("schedule/history.py", "from tpuspec.trainer import Trainer", "schedule must not import trainer"),
    ("trainer.py", "import tpuspec.train", "trainer must not import train"),
    ("testing/tiny.py", "from tpuspec.trainer import Trainer", "testing must not import trainer"),
    ("testing/tiny.py", "from tpuspec import Trainer", "testing must not import tpuspec"),
    ("utils.py", "", "layer 'utils' is not in MAY_IMPORT"),
    ("loops/train.py", "import torch_xla", "only tpuspec/tracer may import torch_xla"),
    ("loops/train.py", "from torch_xla.core import xla_model", "only tpuspec/tracer may import torch_xla"),
    ("train.py", "importlib.import_module('torch_xla')", "only tpuspec/tracer may import torch_xla"),
    ("train.py", "load('torch_xla.runtime')", "only tpuspec/tracer may import torch_xla"),
    ("tracer/capture.py", "import jax", "only tpuspec/engine may import jax"),
    ("tracer/capture.py", "from jaxlib.mlir import ir", "only tpuspec/engine may import jaxlib"),
])
def test_an_uphill_import_is_found(tmp_path, path, source, complaint):
    (found,) = violations(made_up_package(tmp_path, path, source))
    assert complaint in found


@pytest.mark.parametrize(("path", "source"), [
    ("spec/mode.py", "from tpuspec.errors import SpecError\nfrom . import backend"),
    ("tracer/graph.py", "import torch_xla\nimport tpuspec.tracer.capture\nimport_module(f'.{name}', __package__)"),
    ("loops/train.py", "from ..drain.drain import Drain\nfrom tpuspec.config import RunConfig"),
    ("trainer.py", "'''Runs on torch_xla.'''\nfrom tpuspec.schedule import history\nversion('torch_xla')"),
    ("train.py", "import tpuspec\nfrom tpuspec import Trainer, config\nimport_module(name)"),
    ("__init__.py", "from tpuspec.trainer import Trainer"),
])
def test_a_downhill_import_passes(tmp_path, path, source):
    assert violations(made_up_package(tmp_path, path, source)) == []


def test_import_tpuspec_leaves_torch_xla_and_jax_alone():
    source = ("import sys, tpuspec; print(tpuspec.__file__); "
              "print([name for name in sys.modules if name.partition('.')[0] in ('torch_xla', '_XLAC', 'jax')])")
    result = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(ROOT / "tpuspec" / "__init__.py"), "[]"]
