"""Compiles every recipe, in every mode and layout, for TPU chips that are not there.

    make plans                                   all: a quarter of an hour on two cores
    make plans ARGS="digits tabular --layouts mesh --topologies v6e:2x2 --modes train"     some
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OTHERS = {"resnet50", "llama_mesh"}
"""One needs a folder of images, the other has a mesh of its own; the same model_fn is planned by resnet and llama."""
RECIPES = sorted({path.stem for path in (
    Path(__file__).resolve().parents[2] / "tpuspec" / "configs" / "config").glob("*.yaml")} - _OTHERS)
LAYOUTS = {"one chip": ["tpu.num_shards=1"], "4 replicas": [], "mesh": ["tpu.mesh={data: 4}", "tpu.fsdp=true"]}
TOPOLOGIES, MODES = ("v5e:2x2", "v6e:2x2"), ("train", "eval", "predict")


def plan(recipe: str, layout: str, topologies: Sequence[str] = TOPOLOGIES, modes: Sequence[str] = MODES,
         overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Plans a recipe; returns a plan for each topology.

    Raises:
      RuntimeError: one does not compile or fit, or cannot be planned; with what was said of it.
    """
    from tpuspec.train import main

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(
            said := io.StringIO()):
        code = main([f"config={recipe}", "mode=plan", f"model_dir={folder}", *LAYOUTS[layout], *overrides,
                     f"plan.topology=[{','.join(topologies)}]", f"plan.modes=[{','.join(modes)}]"])
        if code:
            raise RuntimeError(f"{recipe}, {layout}: {said.getvalue()}")
        return json.loads(next(Path(folder).rglob("plan.json")).read_text())


def main() -> None:
    """Plans, and prints a line for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help=", ".join(RECIPES))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    asked = parser.parse_args()
    if unknown := set(asked.recipes) - set(RECIPES):
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    has_failed = False
    for recipe in asked.recipes or RECIPES:
        for layout in asked.layouts:
            try:
                for found in plan(recipe, layout, asked.topologies, asked.modes):
                    for mode in found["modes"]:
                        print(f"{recipe:10} {layout:10} {found['topology']:8} {mode['mode']:8} compiles in "
                              f"{mode['compile_seconds']:5.1f} s, {mode['peak_bytes'] / 2**20:9.1f} MiB", flush=True)
            except RuntimeError as error:
                has_failed = True
                print(error, flush=True)
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
