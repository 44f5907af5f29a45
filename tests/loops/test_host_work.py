from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torchmetrics import SumMetric

from tpuspec import summary
from tpuspec.drain.drain import DrainedStep
from tpuspec.drain.metric_state import MetricState
from tpuspec.errors import HostCallError, SpecError
from tpuspec.loops.host_work import EvalWork, LossMean, TrainWork, run_host_function
from tpuspec.spec.results import HostFunctions, StepRows
from tpuspec.summary.progress import Progress
from tpuspec.testing import ManualClock, MemoryWriter


def rows(*real: int) -> StepRows:
    return StepRows(mask=torch.tensor(real, dtype=torch.bool), num_rows=sum(real))


def drained(step: int, real: StepRows, functions: HostFunctions | None = None, **tensors: Any) -> DrainedStep:
    losses = tensors.pop("loss", [None])
    parts = [tensors if loss is None else {**tensors, "loss": loss} for loss in losses]
    return DrainedStep(step, parts, functions or HostFunctions(), real)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values)


class TestLossMean:
    def test_losses_per_example_give_the_exact_mean_over_rows(self):
        mean = LossMean()
        mean.add_examples(t(1, 2, 3, 4))
        mean.add_examples(t(10))
        assert mean.compute() == 4.0
        assert (mean.num_left_out, mean.only_padded) == (0, False)

    @pytest.mark.parametrize(("losses", "expected"), [((2, 4, 6, 8, 10), 6.0), ((11, 22), 16.5)])
    def test_eval_06_scalar_losses_of_full_batches_are_averaged_over_steps(self, losses, expected):
        mean = LossMean()
        for loss in losses:
            mean.add_batches(t(loss), rows(1, 1).mask)
        assert mean.compute() == expected

    def test_the_loss_is_the_mean_over_all_replicas(self):
        mean = LossMean()
        mean.add_batches(t(1, 2, 3, 6), rows(*[1] * 8).mask)
        assert mean.compute() == 3.0

    def test_batches_of_different_sizes_weigh_by_their_rows(self):
        mean = LossMean()
        mean.add_batches(t(1), rows(1, 1, 1).mask)
        mean.add_batches(t(5), rows(1).mask)
        assert mean.compute() == 2.0

    def test_a_padded_scalar_loss_is_left_out_with_a_warning_of_its_rows(self, caplog):
        mean = LossMean()
        mean.add_batches(t(1, 3), rows(1, 1, 1, 1).mask)
        mean.add_batches(t(5, 99), rows(1, 1, 1, 0).mask)
        assert mean.compute() == 3.0
        assert mean.num_left_out == 1
        with caplog.at_level(logging.WARNING, "tpuspec"):
            mean.warn_of_padding()
        assert "1 rows are left out of the mean loss. Return a loss per example, [batch], in EVAL" in caplog.text

    def test_a_replica_of_padding_alone_does_not_count(self):
        mean = LossMean()
        mean.add_batches(t(4, math.nan), rows(1, 1, 0, 0).mask)
        assert mean.compute() == 4.0
        assert mean.num_left_out == 0

    def test_where_all_batches_are_padded_their_mean_is_taken_with_a_warning(self, caplog):
        mean = LossMean()
        mean.add_batches(t(3, 5), rows(1, 0, 1, 0).mask)
        assert mean.compute() == 4.0
        assert mean.only_padded
        with caplog.at_level(logging.WARNING, "tpuspec"):
            mean.warn_of_padding()
        assert "padding rows are in the mean loss" in caplog.text

    def test_where_all_batches_are_padded_a_replica_of_padding_alone_does_not_count(self):
        mean = LossMean()
        mean.add_batches(t(3, math.nan), rows(1, 0, 0, 0).mask)
        assert mean.compute() == 3.0

    def test_full_batches_bring_no_warning(self, caplog):
        mean = LossMean()
        mean.add_batches(t(3), rows(1, 1).mask)
        mean.warn_of_padding()
        assert caplog.text == ""

    def test_a_sum_that_float32_would_lose_is_kept(self):
        mean = LossMean()
        mean.add_examples(t(2.0**24, 1, 1, 0))
        assert mean.compute() == (2**24 + 2) / 4

    def test_without_rows_the_mean_is_nan(self):
        assert math.isnan(LossMean().compute())


def train_work(writer: MemoryWriter, *, summary_every: int | None = None, log_every: int | None = None,
               clock: ManualClock | None = None) -> TrainWork:
    return TrainWork(writer=writer, progress=Progress(enabled=False), step_kind=lambda: "eager",
                     summary_every=summary_every, log_every=log_every, clock=clock or ManualClock())


def values(writer: MemoryWriter, name: str) -> list[tuple[int, float]]:
    return [(record.step, record.value) for record in writer.records if record.name == name]


def test_host_call_is_not_made_where_its_tensors_were_left_on_the_device():
    functions = HostFunctions(host_call=lambda: pytest.fail("was called"))
    train_work(MemoryWriter())(drained(2, rows(1), functions, loss=t(1)))


def test_host_call_in_train_writes_to_the_default_writer_at_the_step():
    writer = MemoryWriter()
    functions = HostFunctions(host_call=lambda value: summary.scalar("mine", value))
    train_work(writer)(drained(5, rows(1), functions, loss=t(1), host_call={"value": t(2)}))
    assert values(writer, "mine") == [(5, 2.0)]


def test_an_error_of_host_call_in_train_names_the_step_before_and_after_its_update():
    def host_call(x):
        raise ValueError("mine")

    with pytest.raises(HostCallError, match=r"raised ValueError at step 5 \(global_step 4 before its update\): mine"
                       ) as caught:
        train_work(MemoryWriter())(drained(
            5, rows(1), HostFunctions(host_call=host_call), loss=t(1), host_call=[t(1)]))
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_loss_summary_is_the_mean_over_replicas_at_its_distance_and_at_the_end():
    writer = MemoryWriter()
    work = train_work(writer, summary_every=2)
    for step in range(1, 6):
        work(drained(step, rows(1, 1), loss=t(step, step + 2)))
    assert values(writer, "loss") == [(2, 3.0), (4, 5.0)]
    work.finish()
    work.finish()
    assert values(writer, "loss") == [(2, 3.0), (4, 5.0), (5, 6.0)]
    assert writer.num_flushes


@pytest.mark.parametrize("none", [None, 0])
def test_host_08_without_summary_steps_nothing_is_written(none):
    writer = MemoryWriter()
    work = train_work(writer, summary_every=none, log_every=1)
    work(drained(1, rows(1), loss=t(1)))
    work.finish()
    assert writer.records == []


def test_host_08_throughput_counts_steps_and_real_rows_since_the_measurement_before():
    writer, clock = MemoryWriter(), ManualClock()
    work = train_work(writer, summary_every=100, log_every=2, clock=clock)
    for step in range(11, 15):
        clock.advance(0.5 if step < 13 else 0.25)
        work(drained(step, rows(1, 1, 1), loss=t(1)))
    assert values(writer, "global_step/sec") == [(12, 2.0), (14, 4.0)]
    assert values(writer, "examples/sec") == [(12, 6.0), (14, 12.0)]


def eval_work(writer: MemoryWriter | None = None) -> tuple[EvalWork, MetricState]:
    metrics = MetricState()
    return EvalWork(writer=writer or MemoryWriter(), metrics=metrics, progress=Progress(enabled=False),
                    step_kind=lambda: "eager", global_step=40), metrics


def test_metric_fn_sees_each_steps_tensors_by_position_or_by_name():
    work, metrics = eval_work()
    functions = HostFunctions(metric_fn=lambda x, y: {"sum": (SumMetric(), ((x * y).sum(),))})
    work(drained(1, rows(1, 1), functions, loss=t(1), eval_metrics=[t(1, 2), t(3, 4)]))
    work(drained(2, rows(1), functions, loss=t(1), eval_metrics={"y": t(5), "x": t(1)}))
    assert metrics.compute() == {"sum": 16.0}
    assert work.num_rows == 3


def test_losses_per_example_and_scalar_ones_both_reach_the_mean():
    work, _ = eval_work()
    work(drained(1, rows(1, 1), example_losses=t(1, 2)))
    work(drained(2, rows(1), loss=t(6)))
    assert work.loss.compute() == 3.0


def test_metric_fn_is_not_called_without_a_real_row():
    work, metrics = eval_work()
    work(drained(1, rows(0, 0), HostFunctions(metric_fn=lambda x: pytest.fail("was called")), loss=t(1),
                 eval_metrics=[t()]))
    assert metrics.compute() == {}


def test_host_04_host_call_runs_on_every_eval_step_with_the_evaluated_global_step():
    writer = MemoryWriter()
    work, _ = eval_work(writer)
    functions = HostFunctions(host_call=lambda value: summary.scalar("mine", value))
    for step in (1, 2, 3):
        work(drained(step, rows(1), functions, loss=t(1), host_call=[t(step)]))
    assert values(writer, "mine") == [(40, 1.0), (40, 2.0), (40, 3.0)]


def test_metrics_that_have_already_run_are_taken_as_they_are():
    work, metrics = eval_work()
    work(drained(1, rows(1, 1), HostFunctions(eval_metric_ops={"m": 2.0}), loss=t(1)))
    work(drained(2, rows(1, 1), HostFunctions(eval_metric_ops={"m": 4.0}), loss=t(1)))
    assert metrics.compute() == {"m": 3.0}


@pytest.mark.parametrize("metric_fn", [
    lambda x: 1 / 0, lambda x: {"m": (SumMetric(), ("no", "numbers"))}], ids=["in metric_fn", "in update"])
def test_an_error_of_metric_fn_or_of_its_metrics_names_function_and_step(metric_fn):
    work, _ = eval_work()
    with pytest.raises(HostCallError, match="metric_fn raised .* at step 3: "):
        work(drained(3, rows(1), HostFunctions(metric_fn=metric_fn), loss=t(1), eval_metrics=[t(1)]))


def test_a_rule_that_metric_fn_breaks_is_raised_as_it_is():
    work, _ = eval_work()
    with pytest.raises(SpecError, match="Metric with name `loss` is not allowed"):
        work(drained(3, rows(1), HostFunctions(metric_fn=lambda x: {"loss": 1.0}), loss=t(1), eval_metrics=[t(1)]))


def test_spec_04_keys_that_are_not_the_functions_parameters_are_named_in_a_warning(caplog):
    with (caplog.at_level(logging.WARNING, "tpuspec"),
          pytest.raises(HostCallError, match="host_call raised TypeError at step 1: .*unexpected keyword") as caught):
        run_host_function("host_call", lambda x: None, {"x": t(1), "y": t(1)}, step=1)
    assert isinstance(caught.value.__cause__, TypeError)
    assert "Exception while calling host_call" in caplog.text
