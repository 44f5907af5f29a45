"""What a compiler's text says of a program: collectives, the largest temporaries, and where one is refused."""

from __future__ import annotations

import collections
import math
import os
import re
from collections.abc import Callable

import jax
import jaxlib
import torch

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_COLLECTIVES)})(?:-start)?\(")
_SHAPE = re.compile(r"(pred|[a-z]+\d+)[a-z0-9]*\[([\d,]*)\]")
_RESULT = re.compile(r"^  (?:ROOT )?%(\S+) = (\(?[^=]*?\)?) ([a-z][a-z0-9-]*)\(", re.MULTILINE)
_ONE = re.compile(r"((?:pred|[a-z]+\d+)[a-z0-9]*\[[\d,]*\])(\{[^}]*\})?")
_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_NO_MEMORY = frozenset({"parameter", "bitcast", "get-tuple-element", "tuple", "while", "conditional", "constant"})
_MOST_TOLD = 5
_PACKAGES = [os.path.dirname(module.__file__) for module in (jax, jaxlib, torch) if module.__file__]
_LIBRARIES = tuple(os.path.join(folder, "") for folder in (
    *_PACKAGES, os.path.join(os.path.dirname(_PACKAGES[-1]), "torch_xla"), os.path.dirname(os.path.dirname(__file__))))
_PLACE = re.compile(r"^\s+(/\S*?):(\d+)(?::\d+)? \[", re.MULTILINE)


def count_collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns kind -> (how many, bytes of their results) of a compiled program."""
    found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for results, kind in _COLLECTIVE.findall(text):
        count, num_bytes = found[kind]
        found[kind] = count + 1, num_bytes + _bytes_of(results)
    return dict(found)


def largest_temporaries(text: str) -> list[tuple[str, int]]:
    """Returns the largest results of operations that are neither inputs nor outputs: (what, bytes), the largest first.

    Those of one name and size stand for one: what repeats is told once.
    """
    entry = text[text.find("\nENTRY "):]
    entry = entry[:entry.find("\n}")]
    root = entry[entry.rfind("  ROOT "):]
    place_of = _places(text)
    found: dict[tuple[str, int], None] = {}
    for match in _RESULT.finditer(entry):
        name, results, operation = match.groups()
        if operation in _NO_MEMORY or operation.endswith("-done") or f"%{name}" in root:
            continue
        line = entry[match.start():entry.find("\n", match.end())]
        sizes = [(_bytes_of(shape), shape) for shape, layout in _ONE.findall(results) if "S(" not in layout]
        if not sizes:
            continue
        size, shape = max(sizes)
        told = _told(line, operation, place_of)
        found[f"{told} {shape}", size] = None
    return sorted(found, key=lambda each: -each[1])[:_MOST_TOLD]


def _told(line: str, operation: str, place_of: Callable[[int], str]) -> str:
    """Names an operation: torch's name for it, the module that calls it and the line of code."""
    named, frame = _NAME.search(line), _FRAME.search(line)
    parts = named[1].split("call_exported/")[-1].split("/") if named else []
    *scopes, last = parts or [operation]
    if last.startswith("jit("):
        last = operation
    modules = [scope.rpartition(".")[0] for scope in scopes if not scope.startswith(("aten__", "xla__", "jit("))]
    place = place_of(int(frame[1])) if frame else ""
    return " ".join(part for part in (
        last.rpartition("__")[2] if "__" in last else last, f"of {modules[-1]!r}" if modules else "",
        f"at {place}" if place else "") if part)


def _places(text: str) -> Callable[[int], str]:
    """Returns a function from the number of a frame to FILE:LINE of the innermost caller of no library."""
    files = dict(re.findall(r'^(\d+) "(.*)"$', _table(text, "FileNames"), re.MULTILINE))
    locations = {number: (files.get(file, ""), line) for number, file, line in re.findall(
        r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", _table(text, "FileLocations"), re.MULTILINE)}
    frames = {int(number): (location, int(parent or 0)) for number, location, parent in re.findall(
        r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", _table(text, "StackFrames"), re.MULTILINE)}

    def place_of(number: int) -> str:
        seen: set[int] = set()
        while number in frames and number not in seen:
            seen.add(number)
            location, parent = frames[number]
            file, line = locations.get(location, ("", ""))
            if _is_of_user(file):
                return f"{os.path.basename(file)}:{line}"
            number = parent
        return ""

    return place_of


def _table(text: str, name: str) -> str:
    start = text.find(f"\n{name}\n")
    return "" if start < 0 else text[start:text.find("\n\n", start + 1)]


def refusing_place(reason: str) -> str:
    """Returns FILE:LINE of the user's code that asks for what the compiler refuses; "" where it does not say."""
    return next((f"{os.path.basename(file)}:{line}" for file, line in _PLACE.findall(reason) if _is_of_user(file)), "")


def _is_of_user(file: str) -> bool:
    return bool(file) and not file.startswith(_LIBRARIES)


def _bytes_of(results: str) -> int:
    return sum(math.prod(map(int, filter(None, dims.split(",")))) * _bits(dtype) // 8
               for dtype, dims in _SHAPE.findall(results))


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
