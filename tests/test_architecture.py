"""ARCHITECTURE.md names files and functions that exist, and README.md's local links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# In backticks, a name is a path if it is below a top-level folder or ends like one of the project's files.
FOLDERS = ("tpuspec", "tests", "benchmarks", "docs", ".ci")
PATH = re.compile(
    rf"(?:(?:{'|'.join(map(re.escape, FOLDERS))})/[^\s:]*|[\w./*-]+\.(?:py|md|toml|lock))(?::[\w.]+(?:\(\))?)?")
FENCE = re.compile(r"^( *)(```|~~~).*?^ *\2[^\n]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
LINK = re.compile(
    r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)|^\s*\[[^\]]+\]:\s*<?([^\s>]+)|\b(?:src|href)=[\"']([^\"']+)", re.MULTILINE)
REMOTE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)


def names_in_backticks(text: str) -> list[str]:
    """Returns the path-like names among a page's inline code, `file` or `file:function`."""
    spans = (match[2].strip() for match in CODE.finditer(FENCE.sub("", text)))
    return [span for span in spans if PATH.fullmatch(span)]


def defined(body: list[ast.stmt], names: list[str]) -> bool:
    """Whether a class, function or variable stands in `body`, and the rest of `names` inside it."""
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                if name == names[0] and (len(names) == 1 or defined(node.body, names[1:])):
                    return True
            case ast.Assign(targets=targets) if len(names) == 1:
                if any(isinstance(target, ast.Name) and target.id == names[0] for target in targets):
                    return True
            case ast.AnnAssign(target=ast.Name(id=name)) if [name] == names:
                return True
    return False


def complaint(root: Path, name: str) -> str | None:
    """Says what is wrong with `file` or `file:function` below `root`; None if it exists."""
    path, _, symbol = name.partition(":")
    if "*" in path:
        return None if any(root.glob(path)) else f"{name}: no file matches"
    if not (root / path).exists() or (path.endswith("/") and not (root / path).is_dir()):
        return f"{name}: there is no {path}"
    names = symbol.removesuffix("()").split(".")
    if symbol and not defined(ast.parse((root / path).read_text("utf-8")).body, names):
        return f"{name}: {path} does not define {symbol}"
    return None


def broken_links(page: Path) -> list[str]:
    """Returns the local link and image targets of a page that do not exist."""
    text = CODE.sub("", FENCE.sub("", page.read_text("utf-8")))
    targets = [next(filter(None, match.groups())) for match in LINK.finditer(text)]
    local = [target.partition("#")[0] for target in targets if not REMOTE.match(target)]
    return [target for target in local if not (page.parent / target).exists()]


def test_architecture_names_what_exists():
    names = names_in_backticks((ROOT / "ARCHITECTURE.md").read_text("utf-8"))
    assert sum(":" in name for name in names) >= 5, "ARCHITECTURE.md names the stops of a batch as `file:function`"
    assert [found for name in names if (found := complaint(ROOT, name))] == []


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_local_links_lead_somewhere(page):
    assert broken_links(ROOT / page) == []


@pytest.fixture
def small_tree(tmp_path):
    (tmp_path / "tpuspec" / "drain").mkdir(parents=True)
    (tmp_path / "tpuspec" / "drain" / "drain.py").write_text(
        "LIMIT = 8\nsize: int = 1\nclass Drain:\n    depth: int = 0\n    def submit(self): ...\ndef drain(): ...\n")
    return tmp_path


@pytest.mark.parametrize("name", [
    "tpuspec/drain/drain.py", "tpuspec/drain/", "tpuspec/drain", "tpuspec/*/drain.py", "tpuspec/drain/drain.py:drain()",
    "tpuspec/drain/drain.py:Drain", "tpuspec/drain/drain.py:Drain.submit", "tpuspec/drain/drain.py:Drain.depth",
    "tpuspec/drain/drain.py:LIMIT", "tpuspec/drain/drain.py:size",
])
def test_a_name_that_exists_passes(small_tree, name):
    assert names_in_backticks(f"See `{name}`.") == [name]
    assert complaint(small_tree, name) is None


@pytest.mark.parametrize("name", [
    "tpuspec/drain/gone.py", "drain/drain.py", "drain.py", "tpuspec/loops/", "tpuspec/*/gone.py", "GONE.md",
    "tpuspec/drain/drain.py:gone", "tpuspec/drain/drain.py:Drain.gone", "tpuspec/drain/drain.py:submit",
    "tpuspec/drain/drain.py:Drain.submit.gone", "tpuspec/drain/drain.py:12",
])
def test_a_name_that_does_not_exist_is_found(small_tree, name):
    assert names_in_backticks(f"See `{name}`.") == [name]
    assert name in str(complaint(small_tree, name))


def test_other_code_is_no_path():
    text = "`train/eval`, `a.b`, `model_dir/eval/metrics.jsonl`, `fn(x)`, `x / y`\n```\n`tpuspec/gone.py`\n```\n"
    assert names_in_backticks(text) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("[a](README.md#top) ![b](gone.png 'title') [c](https://example.org/x) [d](#top)\n"
                    '<img src="docs/gone.svg">\n[e]: gone.md\n`[f](g)`\n```\n[h](i)\n```\n')
    assert broken_links(page) == ["gone.png", "docs/gone.svg", "gone.md"]


def test_no_two_public_classes_have_one_name():
    where: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tpuspec").rglob("*.py")):
        if "recipes" in path.parts:  # each is a user's program
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}
