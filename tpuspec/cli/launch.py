"""Runs the jobs of one command, and turns every error into its exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.cli.choices import find_choices
from tpuspec.cli.command_line import format_help, parse_arguments
from tpuspec.cli.compose import Job, compose_jobs
from tpuspec.errors import (
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    DeviceError,
    HangError,
    HostCallError,
    HostFailureError,
    NonFiniteLossError,
    TpuspecError,
)
from tpuspec.plan.plan import PlanError
from tpuspec.spec.phase import phase_of, step_of
from tpuspec.summary.readable import format_value

DONE, FAILED, WRONG_CONFIG, STATE_REFUSED, INTERRUPTED = 0, 1, 2, 3, 130

RunJob = Callable[[Job], Mapping[str, Any]]


def launch(argv: Sequence[str], run_job: RunJob, *, version: str, now: datetime) -> int:
    """Runs a command line and returns its exit code.

    Args:
      argv: arguments, without the program's name.
      run_job: runs one job and returns its metrics.
      version: of tpuspec, for --version.
      now: names the folder of a sweep.
    """
    try:
        arguments = parse_arguments(argv)
        if arguments.show_help:
            print(format_help(find_choices(arguments.config_dir)))
            return DONE
        if arguments.show_version:
            print(f"tpuspec {version}")
            return DONE
        jobs = compose_jobs(arguments.overrides, config_dir=arguments.config_dir, multirun=arguments.multirun, now=now)
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    if arguments.show_config:
        print("---\n".join(job.resolved for job in jobs), end="")
        return DONE
    return _run_sweep(jobs, run_job) if arguments.multirun else run_reported(jobs[0], run_job)[0]


def run_reported(job: Job, run_job: RunJob) -> tuple[int, Mapping[str, Any]]:
    """Runs one job; returns its exit code and its metrics, and reports its error, if any, on stderr."""
    try:
        return DONE, run_job(job)
    except (Exception, KeyboardInterrupt) as error:
        return report(error, job.settings.model_dir), {}
    except SystemExit as error:
        if notes := _notes(error):  # a signal's, not the user's
            print(f"interrupted by SIGTERM: {notes}", file=sys.stderr, flush=True)
        raise


def report(error: BaseException, model_dir: str | None = None) -> int:
    """Prints an error on stderr, with its traceback where user code may have raised it; returns its exit code.

    The first line says what went wrong, where, at which step, and what to do.
    """
    sys.stdout.flush()
    if isinstance(error, KeyboardInterrupt):
        print(f"interrupted by SIGINT: {_notes(error) or 'nothing was left to be saved.'}", file=sys.stderr)
        return INTERRUPTED
    code = (WRONG_CONFIG if isinstance(error, ConfigError | ConfigTypeError) else
            STATE_REFUSED if isinstance(error, CheckpointError) else
            error.exit_code if isinstance(error, HangError) else FAILED)
    # HYDRA_FULL_ERROR is the switch that Hydra's users know.
    is_of_user = code == FAILED and not isinstance(error, DeviceError | HostFailureError | PlanError)
    if is_of_user:
        print(f"error: {_cause(error)}{_way_on(model_dir)}", file=sys.stderr)
    if is_of_user or os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    else:
        print(f"error: {error}{_notes(error, ' ')}", file=sys.stderr)
    sys.stderr.flush()
    return code


def _cause(error: BaseException) -> str:
    """Returns an error's part of the run, step, kind, text and notes in one line."""
    text = (str(error).splitlines() or [""])[0]
    step, phase = step_of(error), phase_of(error, "")
    if not isinstance(error, TpuspecError):
        text = f"{type(error).__name__}: {text}"
    if not isinstance(error, HostCallError | NonFiniteLossError):  # which say so themselves
        text = f"{f'in {phase}' if phase else ''}{f' at step {step}' if step else ''}: {text}".lstrip(": ")
    return f"{text}{_notes(error, ' ')}"


def _notes(error: BaseException, before: str = "") -> str:
    notes = getattr(error, "__notes__", [])
    return before + " ".join(" ".join(note.split()) for note in notes) if notes else ""


def _way_on(model_dir: str | None) -> str:
    """Says where the same command would go on from."""
    steps = CheckpointStore(model_dir).steps() if model_dir else []
    return f" (The same command goes on from step {steps[-1]}, in {model_dir}.)" if steps else ""


def _run_sweep(jobs: list[Job], run_job: RunJob) -> int:
    """Runs all jobs, also after one that failed; the first failure decides the exit code."""
    outcomes: list[tuple[Job, int, Mapping[str, Any]]] = []
    for number, job in enumerate(jobs, start=1):
        print(f"\n=== job {number} of {len(jobs)}: {job.name} -> {job.settings.model_dir}", flush=True)
        code, metrics = run_reported(job, run_job)
        outcomes.append((job, code, metrics))
        if code == INTERRUPTED:
            return code
    print("\n=== sweep")
    for job, code, metrics in outcomes:
        print(f"{job.name}  {format_metrics(metrics) if code == DONE else f'failed with exit code {code}'}")
    folders = [os.path.abspath(job.settings.model_dir or "") for job in jobs]
    print(f"TensorBoard: tensorboard --logdir {os.path.relpath(os.path.commonpath(folders))}", flush=True)
    return next((code for _, code, _ in outcomes if code != DONE), DONE)


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Returns the metrics of one number each as `name value` pairs in one line."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in metrics.items()
                     if name != "global_step" and np.size(value) == 1)
