"""The exporters of a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import serving_input_fn
from tpuspec import BestExporter, FinalExporter, LatestExporter
from tpuspec.cli.schema import ExporterKind, ExportSettings, TrainConfig
from tpuspec.cli.targets import Functions
from tpuspec.export.bundle import METADATA_FILE, Metadata
from tpuspec.train import make_exporters

FUNCTIONS = Functions(model_fn=print, input_fn=print, model=None, optimizer=None, scheduler=None,
                      serving_input_fn=serving_input_fn, report=None)


class Exports:
    """Writes what an exporter reads of an export, and nothing else."""

    def export(self, export_dir_base, serving_input_fn, checkpoint_path=None, *, assets_extra=None, metrics=None):
        folder = Path(export_dir_base) / f"{metrics['global_step']:010}"
        folder.mkdir(parents=True)
        (folder / METADATA_FILE).write_bytes(Metadata(
            global_step=metrics["global_step"], metrics=metrics, inputs={}, single_input=True, signatures={},
            programs={}, files={}, torch_version="2.9.0").encode())
        return str(folder)


def exported(exporter, folder, *accuracies):
    """The steps of which exports are there after evaluations with these accuracies, the last one at the end."""
    for step, accuracy in enumerate(accuracies, start=1):
        metrics = {"accuracy": accuracy, "global_step": step}
        exporter.export(Exports(), str(folder / exporter.name), "checkpoint", metrics, step == len(accuracies))
    return sorted(int(path.name) for path in (folder / exporter.name).iterdir())


@pytest.mark.parametrize(("higher_is_better", "best_steps"), [(True, [1, 3]), (False, [1, 2])])
def test_the_named_kinds_are_made_with_their_settings(tmp_path, higher_is_better, best_steps):
    settings = TrainConfig(export=ExportSettings(
        exporters=[ExporterKind.best, ExporterKind.latest, ExporterKind.final], metric="accuracy",
        higher_is_better=higher_is_better, exports_to_keep=2))
    exporters = make_exporters(settings, FUNCTIONS)
    assert [(type(exporter), exporter.name) for exporter in exporters] == [
        (BestExporter, "best"), (LatestExporter, "latest"), (FinalExporter, "final")]
    assert [exported(exporter, tmp_path, 0.5, 0.4, 0.6, 0.5) for exporter in exporters] == [best_steps, [3, 4], [4]]


def test_no_kind_makes_no_exporter():
    assert make_exporters(TrainConfig(), FUNCTIONS) == []
