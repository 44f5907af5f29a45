"""The wheel holds what the CLI needs, the lock holds what the project asks for, and no file names an index."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

# Written so that this file is none of its own findings.
INDEX_ADDRESS = re.compile(
    r"\bpypi\.|python[h]osted\.|/simple/?(?=[\s\"'`]|$)|npmjs\.|(?<![\w-])--(?:extra-)?index-url[ =]"
    r"|(?<![\w-])--find-links[ =]|\bindex-url *=|PIP_INDEX[_]URL *=|UV_(?:DEFAULT_)?INDEX *=",
    re.IGNORECASE | re.MULTILINE)


def project_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_has_only_the_packages_and_the_configs(wheel):
    metadata = f"tpuspec-{project_table()['version']}.dist-info"
    assert {name.split("/")[0] for name in wheel.namelist()} == {"tpuspec", metadata}
    assert f"{metadata}/licenses/LICENSE" in wheel.namelist()
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_the_wheel_is_typed_and_has_the_command(wheel):
    assert "tpuspec/py.typed" in wheel.namelist()
    (entries,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "tpuspec = tpuspec.train:command" in wheel.read(entries).decode().replace("\"", "")


@pytest.mark.parametrize("pattern", ["tpuspec/configs/**/*.yaml", "tpuspec/**/*.py"])
def test_wheel_holds_every(pattern, wheel):
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
    assert files, f"there is no {pattern}"
    assert files <= set(wheel.namelist())


def lock_entries(text: str) -> list[str]:
    """Returns the entries of a requirements file: each requirement with its continuation lines."""
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def test_every_lock_entry_is_pinned_and_hashed():
    entries = lock_entries((ROOT / "requirements.lock").read_text("utf-8"))
    assert len(entries) > 20
    wrong = [entry for entry in entries if not re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", entry)]
    assert wrong == []


def test_lock_header_names_its_make_target():
    assert "make lock" in (ROOT / "requirements.lock").read_text("utf-8").splitlines()[1]


def test_lock_holds_what_the_project_asks_for():
    locked: dict[str, list[str]] = {}
    for entry in lock_entries((ROOT / "requirements.lock").read_text("utf-8")):
        name, version = entry.split()[0].split("==")
        locked.setdefault(canonicalize_name(name), []).append(version)
    project = project_table()
    asked = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    lacking = [str(asked_for) for asked_for in asked
               if not locked.get(name := canonicalize_name(asked_for.name))
               or not all(asked_for.specifier.contains(version) for version in locked[name])]
    assert lacking == [], "run: make lock"


def test_no_file_names_a_package_index():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        text=True, check=False) if (ROOT / ".git").exists() else None
    if listed is None or listed.returncode != 0:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in content:
            text = content.decode("utf-8", "replace")
            found += [f"{name}: {match[0]}" for match in INDEX_ADDRESS.finditer(text)]
    assert found == []


@pytest.mark.parametrize("line", [
    "https://{}.org/".format("pypi"), "files.{}.org".format("pythonhosted"), "http://host/{}".format("simple/"),
    "--{} x".format("index-url"), "--{}=x".format("extra-index-url"), "{} = x".format("index-url"),
])
def test_an_index_address_is_found(line):
    assert INDEX_ADDRESS.search(line)


@pytest.mark.parametrize("line", ["a simple thing", "--no-emit-index-url \\", "--no-emit-find-links", "PyPI has it."])
def test_other_words_are_no_address(line):
    assert not INDEX_ADDRESS.search(line)
