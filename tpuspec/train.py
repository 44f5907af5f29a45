"""`python -m tpuspec.train config=NAME`: parse, build, run, close. `--help` explains it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import tpuspec
from tpuspec.cli.compose import Job
from tpuspec.cli.launch import FAILED, format_metrics, launch
from tpuspec.cli.output import survive_closed_output
from tpuspec.cli.record import describe_environment, replacing, write_record
from tpuspec.cli.schema import ExporterKind, Mode, TrainConfig, run_config
from tpuspec.cli.targets import Functions, resolve_functions
from tpuspec.errors import ConfigError
from tpuspec.export.bundle import Metadata
from tpuspec.export.signature import describe
from tpuspec.loops.ending import end_within
from tpuspec.loops.interruption import interruptible
from tpuspec.plan.picture import write_picture
from tpuspec.plan.plan import check_fits
from tpuspec.plan.table import print_plan
from tpuspec.schedule.exporters import compare_metric
from tpuspec.schedule.train_and_evaluate import EXPORT_FOLDER
from tpuspec.spec.warm_start import parse_warm_start

PLAN_FILE = "plan.json"
PICTURE_FILE = "plan.png"
PREDICTIONS_FILE = "predictions.jsonl"
_NUM_SHOWN_PREDICTIONS = 3
_MOST_SECONDS_TO_END = 8.0
_EVALUATOR_SECONDS = 5  # from one look for a new checkpoint to the next


def command(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line as the whole of this process, and ends it; see `main`."""
    survive_closed_output()
    code: object = FAILED
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
        raise
    finally:
        if code:  # behind an error somebody's thread may wait for ever, and Python would wait for it
            end_within(_MOST_SECONDS_TO_END, code if isinstance(code, int) else FAILED)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (that of this process where None is given) and returns its exit code.

    Raises:
      SystemExit: the user's code raised it, or SIGTERM came, with code 143.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:  # tpuspec train config=NAME
        argv = argv[1:]
    started = datetime.now().astimezone()
    environment = describe_environment(argv, version=tpuspec.__version__, started=started)
    with interruptible(tpuspec.RunConfig.grace_seconds, owns_process=True):
        return launch(argv, lambda job: run(job, environment), version=tpuspec.__version__, now=started)


def run(job: Job, environment: Mapping[str, Any]) -> Mapping[str, Any]:
    """Builds the Trainer of one job, runs its mode and returns the metrics.

    Args:
      job: a composed job.
      environment: what is written beside the settings before training.
    """
    settings = job.settings
    functions = resolve_functions(settings, job.prefixes)
    warm_start_from = parse_warm_start(settings.warm_start_from)
    trainer = tpuspec.Trainer(
        functions.model_fn, model=functions.model, optimizer=functions.optimizer,
        scheduler=functions.scheduler, model_dir=settings.model_dir, config=run_config(settings),
        params=settings.params, use_tpu=settings.use_tpu,
        train_batch_size=settings.train_batch_size, eval_batch_size=settings.eval_batch_size,
        predict_batch_size=settings.predict_batch_size, batch_axis=settings.batch_axis,
        eval_on_tpu=settings.eval_on_tpu, export_to_tpu=settings.export.to_tpu, export_to_cpu=settings.export.to_cpu,
        warm_start_from=None if settings.mode is Mode.plan else warm_start_from)
    needs_checkpoint = settings.mode in (Mode.evaluate, Mode.predict, Mode.export) and warm_start_from is None
    if needs_checkpoint and trainer.latest_checkpoint() is None:
        raise ConfigError(f"mode={settings.mode.name} needs a checkpoint, and model_dir {settings.model_dir} holds "
                          "none. Train first, or give the folder of a training run, model_dir=DIR.")
    if settings.mode is Mode.plan:
        return plan(job, trainer, functions)
    if settings.mode is Mode.predict:
        return predict(job, trainer, functions)
    if settings.mode is Mode.export:
        return export(job, trainer, functions)
    metrics: Mapping[str, Any] = {}
    if settings.mode is not Mode.evaluate:
        metrics = train(job, trainer, functions, environment)
    if settings.mode is not Mode.train and metrics.get("global_step") != trainer.global_step():
        metrics = trainer.evaluate(functions.input_fn, steps=settings.run.eval_steps)
    if not trainer.is_chief:
        return metrics
    if metrics:
        print(f"evaluation at step {metrics['global_step']}: {format_metrics(metrics)}")
    if functions.report is not None and settings.mode is not Mode.evaluate:
        functions.report(trainer)
    print(f"TensorBoard: tensorboard --logdir {settings.model_dir}", flush=True)
    return metrics


def train(job: Job, trainer: tpuspec.Trainer, functions: Functions,
          environment: Mapping[str, Any]) -> Mapping[str, Any]:
    """Trains, unless training is complete already; the settings are written first.

    Returns:
      Metrics of the last evaluation of mode=train_and_evaluate; {} without one.
    """
    settings, step = job.settings, trainer.global_step()
    if settings.run.max_steps is not None and step >= settings.run.max_steps:
        print(f"training is complete: {settings.model_dir} is at step {step}, run.max_steps is "
              f"{settings.run.max_steps}. A larger run.max_steps goes on from there.", flush=True)
        return {}
    if trainer.is_chief:
        write_record(trainer.model_dir, job.resolved, environment)
    saves = trainer.config.save_checkpoints_steps or trainer.config.save_checkpoints_secs
    exporters = make_exporters(settings, functions)
    is_evaluator = trainer.config.cluster.task_type == "evaluator"
    if settings.mode is Mode.train or not (saves or exporters or is_evaluator):
        trainer.train(functions.input_fn, steps=settings.run.steps, max_steps=settings.run.max_steps)
        return {}
    metrics, _ = tpuspec.train_and_evaluate(
        trainer, tpuspec.TrainSpec(functions.input_fn, max_steps=settings.run.max_steps),
        tpuspec.EvalSpec(functions.input_fn, steps=settings.run.eval_steps, exporters=exporters, start_delay_secs=0,
                         throttle_secs=_EVALUATOR_SECONDS if is_evaluator else 0))
    return metrics or {}


def make_exporters(settings: TrainConfig, functions: Functions) -> list[tpuspec.Exporter]:
    """Returns the exporters that the settings name."""
    export, receive = settings.export, functions.serving_input_fn
    if not export.exporters:
        return []
    assert receive is not None, "checked with the settings"
    compare = compare_metric(export.metric, higher_is_better=export.higher_is_better)
    makes = {
        ExporterKind.best: lambda name: tpuspec.BestExporter(
            name, receive, compare_fn=compare, exports_to_keep=export.exports_to_keep),
        ExporterKind.latest: lambda name: tpuspec.LatestExporter(
            name, receive, exports_to_keep=export.exports_to_keep),
        ExporterKind.final: lambda name: tpuspec.FinalExporter(name, receive)}
    return [makes[kind](kind.name) for kind in export.exporters]


def predict(job: Job, trainer: tpuspec.Trainer, functions: Functions) -> Mapping[str, Any]:
    """Writes a line of JSON for each example into model_dir, and prints the first ones."""
    if not trainer.is_chief:
        with contextlib.closing(trainer.predict(functions.input_fn)) as predictions:
            return {"num_predictions": sum(1 for _ in predictions)}
    path = os.path.join(trainer.model_dir, PREDICTIONS_FILE)
    num_predictions = 0
    with replacing(path) as file, contextlib.closing(trainer.predict(functions.input_fn)) as predictions:
        for num_predictions, prediction in enumerate(predictions, start=1):
            line = json.dumps(_as_data(prediction))
            file.write(line + "\n")
            if num_predictions <= _NUM_SHOWN_PREDICTIONS:
                print(line)
    print(f"{num_predictions} predictions: {path}", flush=True)
    return {"num_predictions": num_predictions}


def export(job: Job, trainer: tpuspec.Trainer, functions: Functions) -> Mapping[str, Any]:
    """Exports the newest checkpoint, or the one that is named, and prints the folder."""
    settings = job.settings.export
    assert functions.serving_input_fn is not None, "checked with the settings"
    folder = os.path.join(settings.folder or os.path.join(trainer.model_dir, EXPORT_FOLDER), settings.name)
    path = trainer.export(folder, functions.serving_input_fn, settings.checkpoint_path)
    if trainer.is_chief:
        model = Metadata.read(Path(path))
        print(f"  takes  {describe(model.inputs)}")
        for name, signature in model.signatures.items():
            print(f"  {name}  {describe(signature.outputs)}")
        print(f"export: {path}", flush=True)
    return {}


def plan(job: Job, trainer: tpuspec.Trainer, functions: Functions) -> Mapping[str, Any]:
    """Compiles for each topology, prints a table of each and writes plan.json and plan.png.

    Raises:
      PlanError: the run does not fit one of them; the tables say by how much.
    """
    settings = job.settings.plan
    plans = []
    for topology in settings.topology:
        plans.append(trainer.plan(functions.input_fn, topology=topology, modes=settings.modes,
                                  batch=settings.batch))
        print_plan(plans[-1])
    path = os.path.join(trainer.model_dir, PLAN_FILE)
    with replacing(path) as file:
        file.write(json.dumps([each.as_dict() for each in plans], indent=2))
    print(f"plan: {path}", flush=True)
    picture = os.path.join(trainer.model_dir, PICTURE_FILE)
    if write_picture(plans, picture):
        print(f"picture: {picture}", flush=True)
    else:
        print("no picture: matplotlib is not installed; the extra tpuspec[plan] has it", flush=True)
    check_fits(plans)
    return {}


def _as_data(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_data(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


if __name__ == "__main__":
    command()
