"""The arguments of `python -m tpuspec.train` and its help page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tpuspec.cli.choices import Choice, format_choices
from tpuspec.errors import ConfigError

_HELP = """\
usage: tpuspec config=NAME [mode=MODE] [KEY=VALUE ...] [options]       (or python -m tpuspec.train ...)

Trains, evaluates, predicts or exports with a model_fn that returns a TPUEstimatorSpec.

{choices}

Modes:
  mode=train_and_evaluate  trains to run.max_steps, then evaluates (default)
  mode=train               trains to run.max_steps, or for run.steps more steps
  mode=evaluate            evaluates the latest checkpoint of model_dir
  mode=predict             writes model_dir/predictions.jsonl
  mode=export              exports the latest checkpoint for serving, to model_dir/export/serving/<time>

Common settings (any setting that --cfg job prints can be given):
  model_dir=DIR                checkpoints and logs; default runs/NAME; a second run goes on from there
  run.max_steps=500            the step at which training is complete
  run.save_checkpoints_steps=100
  params.learning_rate=0.003   the config's own parameters, of the types they have there (on, off,
                               yes and no are booleans, None is null); +params.new=1 adds one
  train_batch_size=128         global batch sizes, over all replicas
  tpu.iterations_per_loop=100  steps between two checks for checkpoints and hooks
  device=cpu                   plain PyTorch on cpu or cuda, without XLA; also of several processes under torchrun
  quiet=true                   prints results only
  'allow=[mypackage.]'         lets the config name functions of your own package

Options:
  -m, --multirun     runs every combination: params.learning_rate=0.001,0.003
  --config-dir DIR   adds your own configs, DIR/config/NAME.yaml
  -c, --cfg job      prints the settings and stops
  -q, --quiet        the same as quiet=true
  --version          prints the version and stops
  -h, --help         prints this page and stops

Exit codes: 0 done, 1 an error of the run or of your code, 2 a wrong setting, 3 a checkpoint that cannot be used or
another training in model_dir, 4 nothing moved any more, 130 and 143 after SIGINT and SIGTERM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The command line: `overrides` are its key=value arguments."""

    overrides: list[str]
    config_dir: Path | None
    multirun: bool
    show_config: bool
    show_help: bool
    show_version: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See python -m tpuspec.train --help.")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parses the command line; options and key=value arguments may stand in any order.

    Raises:
      ConfigError: an unknown option, or a --config-dir that is no folder.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--quiet", "-q", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    found = parser.parse_intermixed_args(list(argv))
    if found.config_dir is not None and not found.config_dir.is_dir():
        raise ConfigError(f"--config-dir {found.config_dir} is no folder. Give the one that holds config/NAME.yaml.")
    return Arguments(overrides=found.overrides + (["quiet=true"] if found.quiet else []), config_dir=found.config_dir,
                     multirun=found.multirun, show_config=found.cfg is not None, show_help=found.help,
                     show_version=found.version)


def format_help(choices: dict[str, Choice]) -> str:
    """Returns the help page."""
    return _HELP.format(choices=format_choices(choices))
