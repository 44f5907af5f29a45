"""The configs that config= can choose: files of tpuspec/configs/config/, packaged ones and the user's own."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from tpuspec.errors import ConfigError

GROUP = "config"
PACKAGED_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_PACKAGE_HEADER = "# @package _global_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One file that config= can choose.

    Attributes:
      name: as config= takes it.
      path: the file.
      description: its first comment after the package header.
    """

    name: str
    path: Path
    description: str


def find_choices(config_dir: Path | None = None) -> dict[str, Choice]:
    """Finds the choices of the packaged folder and of the user's, by name.

    Args:
      config_dir: the user's folder, which holds config/NAME.yaml.

    Raises:
      ConfigError: a folder has no such files, or both have the same name: one of them would be ignored.
    """
    choices: dict[str, Choice] = {}
    for folder in (PACKAGED_CONFIGS, config_dir):
        if folder is None:
            continue
        paths = sorted((folder / GROUP).glob("**/*.yaml"))
        if not paths:
            raise ConfigError(f"{folder} holds no {GROUP}/NAME.yaml. Put your file into {folder / GROUP}, and begin it "
                              f"with '{_PACKAGE_HEADER}'.")
        for path in paths:
            name = path.relative_to(folder / GROUP).with_suffix("").as_posix()
            if name in choices:
                raise ConfigError(f"config={name} is both {choices[name].path} and {path}. Rename yours.")
            choices[name] = Choice(name=name, path=path, description=_describe(path))
    return choices


def _describe(path: Path) -> str:
    comments = (line.lstrip("#").strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
                if line.startswith("#"))
    return next((text for text in comments if text and not text.startswith("@package")), "")


def check_choice(name: str, choices: dict[str, Choice]) -> None:
    """Checks that `name` can be chosen.

    Raises:
      ConfigError: there is none of that name (the nearest is suggested), or its file lacks the package header.
    """
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=1)
        raise ConfigError(f"There is no config={name}" + (f"; did you mean config={near[0]}?" if near else ".")
                          + "\n" + format_choices(choices))
    with choices[name].path.open(encoding="utf-8", errors="replace") as lines:
        if not any(line.strip() == _PACKAGE_HEADER for line in lines):
            raise ConfigError(f"{choices[name].path} must begin with '{_PACKAGE_HEADER}', so that its keys are the "
                              "settings themselves.")


def format_choices(choices: dict[str, Choice]) -> str:
    """Returns the choices with their descriptions, a line each."""
    width = max(map(len, choices), default=0)
    lines = [f"  config={choice.name:<{width}}  {choice.description}".rstrip() for choice in choices.values()]
    return "\n".join(["Configs to choose from:", *lines])
