"""Plans for TPU chips that are not there: libtpu compiles, nothing runs."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tpuspec import CrossShardOptimizer, ModeKeys, RunConfig, TPUConfig, TPUEstimatorSpec, Trainer
from tpuspec.errors import ConfigError
from tpuspec.plan.chips import CHIPS
from tpuspec.plan.plan import ModePlan, PlanError, check_fits
from tpuspec.plan.search import search_largest
from tpuspec.plan.table import format_bytes, print_plan
from tpuspec.train import main

WIDTH, ROWS = 256, 64
NUM_PARAMETERS = WIDTH * WIDTH + WIDTH


def model_fn(features, labels, mode, params, model, optimizer):
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"y": model(features)})
    losses = (model(features) - labels).square().mean(1)
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses)
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def input_fn(params, mode):
    x = torch.randn(2 * ROWS, WIDTH)
    return TensorDataset(x, x) if mode != ModeKeys.PREDICT else x.split(params["batch_size"])


def make(tmp_path, model_fn=model_fn, *, batch_size=ROWS, model=None, **tpu):
    return Trainer(
        model_fn, model=model or (lambda params: nn.Linear(WIDTH, WIDTH)),
        optimizer=lambda model, params: torch.optim.AdamW(model.parameters()), model_dir=tmp_path,
        train_batch_size=batch_size, eval_batch_size=batch_size, predict_batch_size=batch_size,
        config=RunConfig(seed=0, show_progress=False, tpu_config=TPUConfig(**tpu)))


def test_replicas_on_four_chips_have_the_memory_of_what_the_engine_would_hold(tmp_path, capsys):
    module = nn.Linear(WIDTH, WIDTH)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make(tmp_path, model=module)
    plan = trainer.plan(input_fn, topology="v5e:2x2", modes=("train", "eval"))
    assert (plan.chip, plan.num_chips, plan.layout) == ("TPU v5 lite", 4, "4 replicas") and plan.fits
    train, evaluation = plan.modes
    held = {kind: train.argument_bytes[kind] for kind in ("parameters", "batch")}
    assert held == {"parameters": 4 * NUM_PARAMETERS, "batch": 2 * 4 * WIDTH * ROWS // 4}
    assert 0 <= train.argument_bytes["optimizer state"] - 8 * NUM_PARAMETERS <= 64  # and the counts of steps
    assert "optimizer state" not in evaluation.argument_bytes
    assert train.flops > evaluation.flops > 2 * WIDTH * WIDTH * ROWS // 4
    count, size = train.collectives["all-reduce"]
    assert count >= 1 and size >= 4 * NUM_PARAMETERS and not evaluation.collectives
    assert train.aliased_bytes >= 12 * NUM_PARAMETERS  # the state is written where it lay
    assert train.capacity_bytes == CHIPS["v5e"].memory_bytes and train.peak_bytes < train.capacity_bytes
    assert train.least_seconds == max(train.compute_seconds, train.memory_seconds, train.link_seconds)
    print_plan(plan)
    assert "4 replicas" in (shown := capsys.readouterr().out) and format_bytes(4 * NUM_PARAMETERS) in shown
    # Nothing ran, and nothing was written.
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert trainer.latest_checkpoint() is None and module.weight.device.type == "cpu"


def test_fsdp_over_sixteen_chips_of_four_hosts_splits_the_state(tmp_path):
    trainer = make(tmp_path, mesh={"data": 16}, fsdp=True, steps_per_execution=2)
    (train,) = trainer.plan(input_fn, topology="v5e:4x4").modes
    assert train.argument_bytes["parameters"] == 4 * NUM_PARAMETERS // 16
    assert train.argument_bytes["batch"] == 2 * 2 * 4 * WIDTH * ROWS // 16 and train.steps_per_program == 2
    assert "all-gather" in train.collectives and train.fits


def test_a_step_that_needs_more_memory_than_a_chip_has_says_by_how_much(tmp_path):
    def sorting(features, labels, mode, params, model, optimizer):
        x = model(features)[:, :1]
        loss = (x @ x.T).sort(dim=1).values.square().mean()  # [rows, rows]
        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))

    def many(params):
        x = torch.zeros(params["batch_size"], WIDTH)
        return iter([(x, x)])

    plan = make(tmp_path, sorting, batch_size=65536, num_shards=1).plan(many, topology="v5e:2x2")
    assert not plan.fits and json.loads(json.dumps(plan.as_dict()))["fits"] is False
    (train,) = plan.modes
    assert train.peak_bytes > 65536 ** 2 * 4 > train.capacity_bytes > 15 * 2**30 and "HBM" in train.reason
    with pytest.raises(PlanError, match=r"train does not fit v5e:2x2: a device would need .* GiB .* has 15\.8 GiB"):
        check_fits([plan])


def test_what_cannot_be_planned_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="'v9:2x2' is none that libtpu knows.*such as v5e:2x2"):
        make(tmp_path).plan(input_fn, topology="v9:2x2")
    with pytest.raises(ConfigError, match="needs 8 devices, and 4 are there"):
        make(tmp_path, mesh={"data": 8}).plan(input_fn, topology="v5e:2x2")
    with pytest.raises(ConfigError, match="modes of a plan are 'train', 'eval' and 'predict'.*'test'"):
        make(tmp_path).plan(input_fn, topology="v5e:2x2", modes=["test"])

    def branching(features, labels, mode, params, model, optimizer):
        loss = model(features).square().mean()
        if loss > 1:
            loss = loss * 2
        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))

    with pytest.raises(ConfigError, match=r"can be captured: the step reads a value .*test_plan\.py.* runs nothing"):
        make(tmp_path, branching, num_shards=1).plan(input_fn, topology="v5e:2x2")


def test_a_trainer_trains_after_a_plan_as_without_one(tmp_path):
    weights = []
    for name in ("planned", "not"):
        trainer = make(tmp_path / name, num_shards=1)
        if name == "planned":
            trainer.plan(lambda params: iter([(torch.ones(ROWS, WIDTH),) * 2] * 9), topology="v5e:2x2")
        torch.manual_seed(5)
        trainer.train(lambda params: iter([(torch.ones(ROWS, WIDTH),) * 2] * 9), steps=4)
        weights.append({key: trainer.get_variable_value(key) for key in trainer.get_variable_names()})
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert (value == weights[1][key]).all(), key


def test_the_command_line_plans_a_recipe_for_two_topologies(tmp_path, capsys):
    argv = ["config=digits", "mode=plan", f"model_dir={tmp_path}", "plan.modes=[train]"]
    assert main([*argv, "plan.topology=[v5e:2x2,v6e:2x2]"]) == 0
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert [(plan["topology"], plan["fits"], plan["modes"][0]["compiles"]) for plan in plans] == [
        ("v5e:2x2", True, True), ("v6e:2x2", True, True)]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "picture: " in shown and "examples/s, at most" in shown
    assert "v6e:2x2 (TPU v6 lite, 4 chips), 4 replicas" in shown
    assert main(argv) == 2
    assert "needs plan.topology" in capsys.readouterr().err
    assert main(["config=digits", "mode=train", "plan.topology=v5e:2x2", f"model_dir={tmp_path}"]) == 2
    assert "plan.topology has no effect with mode=train" in capsys.readouterr().err
    assert main([*argv, "plan.topology=v5e:2x2", "device=cpu"]) == 2


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)
        self.tied = self.down
        self.register_buffer("scale", torch.linspace(1.0, 2.0, WIDTH))
        nn.init.trunc_normal_(self.up.weight)

    def forward(self, x):
        return self.tied(self.up(x).relu()) * self.scale.to(x.dtype)


def test_parameters_and_optimizer_state_take_no_memory(tmp_path):
    width = 1 << 22  # with AdamW 24 GiB
    trainer = make(tmp_path, model=lambda params: Wide(width), mesh={"data": 16}, fsdp=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (train,) = trainer.plan(input_fn, topology="v5p:4x4x1").modes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 << 20  # KiB
    whole = 4 * (2 * WIDTH * width + width + WIDTH)
    assert train.argument_bytes["parameters"] == pytest.approx(whole / 16, rel=1e-6)
    assert train.argument_bytes["optimizer state"] == pytest.approx(2 * whole / 16, rel=1e-6)
    assert train.argument_bytes["buffers"] == 4 * WIDTH and train.fits


def test_a_model_function_that_reads_its_parameters_is_built_with_memory_and_said_so(tmp_path, caplog):
    def reading(params):
        module = nn.Linear(WIDTH, WIDTH)
        module.norm = float(module.weight.norm())
        return module

    (train,) = make(tmp_path, model=reading, num_shards=1).plan(input_fn, topology="v5e:2x2").modes
    assert train.argument_bytes["parameters"] == 4 * NUM_PARAMETERS
    assert "the model function needs the values of its parameters" in caplog.text


@pytest.mark.parametrize(("fixed", "per_row", "unit", "start"), [
    (1e6, 1e5, 4, 64), (1e9, 1e8, 4, 4096), (1e10, 5e7, 64, 64), (1e9, 3e8, 1, 7)])
def test_the_largest_batch_is_found_by_a_few_compiles(fixed, per_row, unit, start):
    capacity, tried = 16 << 30, []

    def plan(rows):
        tried.append(rows)
        peak = int(fixed + per_row * rows)
        return ModePlan(mode="train", compiles=peak <= capacity, fits=peak <= capacity, rows=rows, peak_bytes=peak,
                        capacity_bytes=capacity)

    found = search_largest(plan(start), unit, plan)
    best = int((capacity - fixed) // per_row // unit * unit)
    assert found.fits and best * 0.99 - unit < found.rows <= best
    assert found.rows < found.rows_too_many <= found.rows * 1.01 + unit
    assert len(tried) == len(set(tried)) == found.num_tried <= 8 and not any(rows % unit for rows in tried)


def test_where_no_batch_fits_the_search_ends_at_the_smallest():
    found = search_largest(
        ModePlan(mode="train", compiles=False, fits=False, rows=64, peak_bytes=2 << 34, capacity_bytes=1 << 34), 16,
        lambda rows: ModePlan(mode="train", compiles=False, fits=False, rows=rows, peak_bytes=2 << 34,
                              capacity_bytes=1 << 34))
    assert (found.rows, found.fits, found.rows_too_many) == (16, False, None)


def test_the_largest_batch_of_a_step_and_of_one_whose_rows_are_not_free(tmp_path):
    trainer = make(tmp_path)
    (evaluation,) = trainer.plan(input_fn, topology="v5e:2x2", modes=["eval"], batch="largest").modes
    assert evaluation.fits and 1_000_000 < evaluation.rows < 100_000_000 and evaluation.rows % 4 == 0
    assert evaluation.rows < evaluation.rows_too_many <= 1.01 * evaluation.rows + 4 and evaluation.num_tried > 2
    assert evaluation.argument_bytes["batch"] == 2 * 4 * WIDTH * evaluation.rows // 4

    def fixed(features, labels, mode, params, model, optimizer):
        assert params["batch_size"] == len(features)
        loss = model(features.view(ROWS, WIDTH)).square().mean()
        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))

    with pytest.raises(ConfigError, match=r"number of rows\. With 128 in place of 64, it raises RuntimeError: shape"):
        make(tmp_path, fixed, num_shards=1).plan(input_fn, topology="v5e:2x2", batch="largest")
    with pytest.raises(ConfigError, match="the batch of a plan is 'largest', or None.*'huge'"):
        trainer.plan(input_fn, topology="v5e:2x2", batch="huge")


def test_the_largest_buffers_have_the_names_of_modules_parameters_and_features(tmp_path):
    def pairs(features, labels, mode, params, model, optimizer):
        x = model(features["x"])
        loss = (x @ features["x"].T).softmax(1).square().mean()
        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))

    def many(params):
        return iter([{"x": torch.zeros(params["batch_size"], WIDTH)}])

    trainer = make(tmp_path, pairs, batch_size=8192, num_shards=1, model=lambda params: nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Softmax(1), nn.Linear(WIDTH, WIDTH)))
    plan = trainer.plan(many, topology="v5e:2x2")
    (train,) = plan.modes
    assert train.largest[0] == ("features['x']", 4 * 8192 * WIDTH)
    assert {"exp_avg of '0.weight'", "exp_avg_sq of '2.weight'", "parameter '0.weight'"} & dict(train.largest).keys()
    assert all("[8192,8192]" in what and size >= 2 * 8192 * 8192 for what, size in train.largest_temporaries[:1])
    assert plan.compiler.startswith("libtpu 0.")


def test_an_operation_that_the_compiler_refuses_is_named_with_its_line(tmp_path):
    from torch_xla.experimental.stablehlo_custom_call import stablehlo_custom_call

    def unknown(features, labels, mode, params, model, optimizer):
        y = stablehlo_custom_call([model(features)], "nobody_knows", [(ROWS, WIDTH)], [torch.float32])
        return TPUEstimatorSpec(mode, loss=y.square().mean())

    plan = make(tmp_path, unknown, num_shards=1).plan(input_fn, topology="v5e:2x2", modes=["eval"])
    assert not plan.fits and not plan.modes[0].compiles
    with pytest.raises(PlanError, match=r"compiler refuses it: .*nobody_knows not found \(at test_plan\.py:\d+\)"):
        check_fits([plan])


def test_an_operation_that_xla_leaves_to_the_host_is_named_with_its_line(tmp_path):
    def median(features, labels, mode, params, model, optimizer):
        return TPUEstimatorSpec(mode, loss=model(features).median(0).values.mean())

    with pytest.raises(ConfigError, match=r"XLA has no median at test_plan\.py:\d+"):
        make(tmp_path, median, num_shards=1).plan(input_fn, topology="v5e:2x2", modes=["eval"])
