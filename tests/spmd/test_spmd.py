"""A mesh of 8 CPU devices against one device on the same global batch."""

from __future__ import annotations

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

import tpuspec
from tests.spmd import layouts, runs
from tests.spmd.conftest import NUM_DEVICES, run_on_one_device
from tpuspec import ModeKeys, SessionRunHook
from tpuspec.engine.executable import num_compiles
from tpuspec.errors import ConfigError, SpecError

RULES = {"0.weight": ["model", None], "0.bias": ["model"], "3.weight": [None, "model"]}
LAYOUTS = {
    "data": ({"mesh": {"data": 8}}, {}),
    "model": ({"mesh": {"model": 8}, "sharding": RULES}, {"0.weight": [2, 8], "0.bias": [2], "3.weight": [8, 2]}),
    "both": ({"mesh": {"model": 4, "data": 2}, "sharding": RULES},
             {"0.weight": [4, 8], "0.bias": [4], "3.weight": [8, 4]}),
    "cores": ({"num_cores_per_replica": 2, "num_shards": 4, "sharding": {"0.weight": ["model", None]}},
              {"0.weight": [8, 8]}),
    "fsdp": ({"mesh": {"data": 8}, "fsdp": True},
             {"0.weight": [2, 8], "0.bias": [2], "3.weight": [8, 2], "3.bias": [1]}),
    "both and fsdp": ({"mesh": {"data": 4, "model": 2}, "sharding": RULES, "fsdp": True},
                      {"0.weight": [8, 2], "0.bias": [8], "3.weight": [2, 8], "3.bias": [2]}),
    "three axes": ({"mesh": {"data": 2, "rows": 2, "columns": 2}, "fsdp": True,
                    "sharding": {"0.weight": [["rows", "columns"], None], "3.weight": ["rows", "columns"]}},
                   {"0.weight": [4, 8], "0.bias": [8], "3.weight": [4, 8], "3.bias": [4]}),
}


def part_shapes(trainer, tensor):
    """Shapes of a tensor's parts, one a device, as the devices hold them."""
    (array,) = trainer._sessions[True].backend.arrays_of([tensor])
    if array is None:
        return "not placed"
    assert len(array.addressable_shards) == NUM_DEVICES
    return {tuple(part.data.shape) for part in array.addressable_shards}


def check_shards(trainer, shards):
    """Parameters, and the optimizer state of each, have the parts that the table says, and no others."""
    replica = trainer._sessions[True].replicas[0]
    for name, parameter in replica.model.named_parameters():
        expected = {tuple(shards.get(name, parameter.shape))}
        assert part_shapes(trainer, parameter) == expected, name
        for key, value in replica.optimizers[""].state[parameter].items():
            if value.ndim:
                assert part_shapes(trainer, value) == expected, (name, key)


def check_equal(found, expected, atol=1e-5):
    assert [item["step"] for item in found["records"]] == [item["step"] for item in expected["records"]]
    assert [item["row"] for item in found["records"]] == [item["row"] for item in expected["records"]]
    np.testing.assert_allclose([item["loss"] for item in found["records"]],
                               [item["loss"] for item in expected["records"]], atol=atol)
    for name, value in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], value, atol=atol, err_msg=name)
    assert found["metrics"]["accuracy"] == expected["metrics"]["accuracy"]
    assert found["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], abs=atol)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=10 * atol)
    assert found["rows"] == list(range(runs.NUM_EVAL_ROWS))


@pytest.mark.parametrize(("scenario", "layout"), [
    *[("all", layout) for layout in LAYOUTS], ("plain", "both"), ("adamw", "data"), ("adamw", "fsdp")])
def test_a_mesh_trains_evaluates_and_predicts_as_one_device_does(scenario, layout, one_device, tmp_path):
    settings, shards = LAYOUTS[layout]
    trainer = runs.make(scenario, tmp_path, **settings)
    found = runs.results(trainer)
    check_equal(found, one_device[scenario])
    assert trainer._sessions[True].backend.step_kind == "replay"
    check_shards(trainer, shards)


BFLOAT16_ULP = 2.0 ** -8
"""Between 1 and the next bfloat16."""


# A product is summed in parts that bfloat16 rounds, so that each step may be off by an ulp; in 'bf16' the loss is
# rounded too. Gradients that lack the rows of one device of four put losses and weights off by more than 25 ulps.
@pytest.mark.parametrize("layout", ["both", "three axes"])
@pytest.mark.parametrize(("scenario", "ulps"), [("bf16", 4), ("bf16-mixed", 1)])
def test_a_mesh_trains_in_bfloat16_as_one_device_does(scenario, ulps, layout, one_device, tmp_path):
    settings, shards = LAYOUTS[layout]
    trainer = runs.make(scenario, tmp_path, **settings)
    found, expected = runs.results(trainer), one_device[scenario]
    atol = ulps * BFLOAT16_ULP
    np.testing.assert_allclose([item["loss"] for item in found["records"]],
                               [item["loss"] for item in expected["records"]], rtol=atol)
    assert found["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], rel=atol)
    for name, value in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], value, atol=atol, err_msg=name)
    check_shards(trainer, shards)
    replica = trainer._sessions[True].replicas[0]
    dtype = torch.bfloat16 if scenario == "bf16" else torch.float32
    moments = [value for state in replica.optimizers[""].state.values() for value in state.values() if value.ndim]
    assert moments and {tensor.dtype for tensor in [*replica.model.parameters(), *moments]} == {dtype}


@pytest.mark.parametrize(("scenario", "layout"), [
    ("all", "both"), ("all", "fsdp"), ("bf16", "both"), ("bf16-mixed", "fsdp")])
def test_replay_has_the_bits_of_tracing(scenario, layout, tmp_path):
    settings, _ = LAYOUTS[layout]
    replayed = runs.results(runs.make(scenario, tmp_path / "on", **settings))
    traced = runs.results(runs.make(scenario, tmp_path / "off", capture="off", **settings))
    assert replayed == traced


@pytest.mark.parametrize("layout", ["both", "fsdp"])
def test_several_steps_in_one_program_have_the_bits_of_single_ones(layout, tmp_path):
    settings, _ = LAYOUTS[layout]
    alone = runs.results(runs.make("adamw", tmp_path / "alone", **settings))
    together = runs.make("adamw", tmp_path / "together", steps_per_execution=4, **settings)
    assert runs.results(together) == alone
    assert together._sessions[True]._compiled[ModeKeys.TRAIN].num_at_once == 4


MESH = {"data": 2, "rows": 2, "columns": 2}


@pytest.mark.parametrize("model", layouts.MODELS)
def test_a_sample_of_the_layouts_of_two_axes_trains_as_one_device_does(model):
    kind, mesh = layouts.MODELS[model], {"data": 2, "model": 4}
    assert max(layouts.differences(kind, mesh, layouts.layouts(kind, mesh)[:12])) < layouts.TOLERANCE


WRONG = (("columns",), ("rows",)), (("rows", "columns"), ("data",))
"""Plain jax 0.10 computes it wrong as well."""


@pytest.mark.parametrize(("dims", "layout"), [
    (None, WRONG), ([1, 4], ((("data",), ()), ((), ("columns",)))),
    ([2, 2], ((("rows",), ("columns",)), (("data",), ("columns",))))])
def test_what_xla_may_get_wrong_is_refused(dims, layout):
    with pytest.raises(ConfigError, match="partitioner was found to put gradients"):
        layouts.differences(layouts.MODELS["linear"], MESH, [layout], input_partition_dims=dims)


def test_what_xla_gets_wrong_is_still_wrong():
    with layouts.nothing_refused():  # where nothing is wrong any more, search again: tests/spmd/layouts.py
        assert min(layouts.differences(layouts.MODELS["linear"], MESH, [WRONG])) > 0.01


def test_a_constraint_changes_no_value_and_is_checked(one_device, tmp_path):
    given = []

    class Constrained(torch.nn.Sequential):
        def forward(self, x):
            hidden = tpuspec.constrain(self[1](self[0](x)), given)
            return self[3](hidden)

    def net(params):
        return Constrained(*runs.net(params))

    settings, _ = LAYOUTS["both"]
    for layout in (["data", "model"], [None, None], [["data", "model"], None]):
        given[:] = layout
        found = runs.results(runs.make("plain", tmp_path / str(len(list(tmp_path.iterdir()))), model=net, **settings))
        check_equal(found, one_device["plain"])
    given[:] = ["data", "columns"]
    with pytest.raises(SpecError, match="constrain names the axis 'columns'; the mesh has model: 4, data: 2"):
        runs.make("plain", tmp_path / "axis", model=net, **settings).train(runs.input_fn, steps=1)
    given[:] = ["data"]
    with pytest.raises(SpecError, match=r"constrain takes an entry for each dim: got \['data'\] for a tensor of shape"):
        runs.make("plain", tmp_path / "dims", model=net, **settings).train(runs.input_fn, steps=1)
    given[:] = ["no", "mesh", "no matter"]
    check_equal(runs.results(runs.make("plain", tmp_path / "one", model=net, num_shards=1)), one_device["plain"])


def first_layout(name="both"):
    return LAYOUTS[name][0]


def test_nothing_is_compiled_anew_once_a_mode_was_captured(tmp_path):
    trainer = runs.make("all", tmp_path, **first_layout())
    runs.results(trainer)
    compiled = num_compiles()
    trainer.train(runs.input_fn, steps=20)
    trainer.evaluate(runs.input_fn)
    list(trainer.predict(runs.input_fn))
    assert num_compiles() == compiled


def test_hooks_read_and_write_weights_that_keep_their_parts(tmp_path):
    _, shards = LAYOUTS["both"]
    seen = []

    class Halve(SessionRunHook):
        def after_run(self, context):
            seen.append(context.model[0].weight.detach().cpu())
            with torch.no_grad():
                context.model[0].weight.mul_(0.5)

    trainer = runs.make("plain", tmp_path, **first_layout())
    trainer.train(runs.input_fn, steps=20, hooks=[Halve()])
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])
    half = runs.weights(trainer)["0.weight"]
    assert torch.equal(half, seen[1] * 0.5)
    trainer.train(runs.input_fn, steps=1)
    check_shards(trainer, {**shards})


def test_evaluation_between_two_trainings_leaves_no_trace(tmp_path):
    alone, between = runs.make("all", tmp_path / "a", **first_layout()), runs.make("all", tmp_path / "b",
                                                                                   **first_layout())
    alone.train(runs.input_fn, max_steps=20)
    between.train(runs.input_fn, max_steps=10)
    between.evaluate(runs.input_fn)
    between.train(runs.input_fn, max_steps=20)
    for name, value in runs.weights(alone).items():
        assert torch.equal(runs.weights(between)[name], value), name


def test_a_checkpoint_goes_on_under_any_other_layout(one_device, tmp_path):
    num_steps = runs.NUM_STEPS // len(LAYOUTS)
    for number, (settings, shards) in enumerate(LAYOUTS.values(), start=1):
        trainer = runs.make("all", tmp_path, **settings)
        trainer.train(runs.input_fn, max_steps=runs.NUM_STEPS if number == len(LAYOUTS) else number * num_steps)
        check_shards(trainer, shards)
    for name, value in one_device["all"]["weights"].items():
        np.testing.assert_allclose(runs.weights(trainer)[name], value, atol=1e-5, err_msg=name)


def test_a_checkpoint_of_a_mesh_goes_on_on_one_device_and_back(tmp_path):
    trainer = runs.make("all", tmp_path / "mesh", **first_layout("fsdp"))
    trainer.train(runs.input_fn, max_steps=runs.NUM_STEPS)
    shutil.copytree(tmp_path / "mesh", tmp_path / "one")
    run_on_one_device("resume", str(tmp_path / "one"))
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    check_equal(runs.results(trainer, 2 * runs.NUM_STEPS), one)
    back = runs.make("all", tmp_path / "one", **first_layout())
    evaluated = back.evaluate(runs.input_fn)
    assert evaluated["global_step"] == one["metrics"]["global_step"] > runs.NUM_STEPS
    assert evaluated["accuracy"] == one["metrics"]["accuracy"]
    assert evaluated["loss"] == pytest.approx(one["metrics"]["loss"], abs=1e-6)


@pytest.mark.parametrize(("sharding", "match"), [
    ({"nothing.*": ["model", None]}, r"matches no parameter of the model; it has 4, such as"),
    ({"0.weight": ["model"]}, r"has 1 entries, one a dimension; it matches 0.weight, which has 2: shape \[16, 8\]"),
    ({"3.odd": ["model", None]}, r"splits dimension 0 of 3.odd, shape \[3, 8\], in \d \(model: \d\)"),
], ids=["no match", "rank", "not divisible"])
def test_a_rule_that_does_not_fit_is_refused_before_anything_is_compiled(sharding, match, tmp_path):
    class Odd(torch.nn.Sequential):
        def __init__(self):
            super().__init__(*runs.net({}))
            if "3.odd" in sharding:
                self[3].odd = torch.nn.Parameter(torch.zeros(3, 8))

    compiled = num_compiles()
    mesh = {"data": NUM_DEVICES // 2, "model": 2}
    trainer = runs.make("plain", tmp_path, mesh=mesh, sharding=sharding, model=lambda params: Odd())
    with pytest.raises(ConfigError, match=match):
        trainer.train(runs.input_fn, steps=1)
    assert num_compiles() == compiled


def test_a_sum_over_replicas_is_refused(tmp_path):
    def summing(features, labels, mode, params, model, optimizer, global_step):
        spec = runs.model_fn(features, labels, mode, params, model, optimizer, global_step)
        return spec.replace(train_op=runs.CrossShardOptimizer(optimizer, reduction="sum").minimize(spec.loss))

    with pytest.raises(SpecError, match="one program computes the loss over the rows of all replicas"):
        runs.make("plain", tmp_path, fn=summing, mesh={"data": NUM_DEVICES}).train(runs.input_fn, steps=1)


def test_settings_that_a_mesh_cannot_honour_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="BROADCAST gives every replica the same rows"):
        runs.make("plain", tmp_path, mesh={"data": NUM_DEVICES},
                  per_host_input_for_training="BROADCAST").train(runs.input_fn, steps=1)
    with pytest.raises(ConfigError, match=rf"mesh \(data: 16\) needs 16 devices, and {NUM_DEVICES} are there"):
        runs.make("plain", tmp_path, mesh={"data": 16}).train(runs.input_fn, steps=1)
    with pytest.raises(ConfigError, match=r"fsdp splits parameters over the mesh axis 'data'.*has one device there"):
        runs.make("plain", tmp_path, num_cores_per_replica=NUM_DEVICES, fsdp=True).train(runs.input_fn, steps=1)


def test_one_process_trains_on_a_mesh_on_replicas_and_on_one_device(one_device, tmp_path):
    runs.make("plain", tmp_path / "mesh", mesh={"data": NUM_DEVICES}).train(runs.input_fn, steps=1)
    found = runs.results(runs.make("plain", tmp_path / "replicas", num_shards=NUM_DEVICES))
    for name, value in one_device["plain"]["weights"].items():
        np.testing.assert_allclose(found["weights"][name], value, atol=1e-5, err_msg=name)
    check_equal(runs.results(runs.make("plain", tmp_path / "one", num_shards=1)), one_device["plain"])


@pytest.mark.parametrize("deployment", ["PER_HOST_V1", "PER_HOST_V2", "PER_SHARD_V1"])
def test_input_fn_is_asked_for_the_rows_of_its_deployment(deployment, one_device, tmp_path):
    asked = []

    def noting(params, mode):
        asked.append((mode, params["batch_size"], params["context"].num_replicas))
        return runs.input_fn(params, mode)

    trainer = runs.make("plain", tmp_path, mesh={"data": NUM_DEVICES}, per_host_input_for_training=deployment)
    runs.RECORDS.clear()
    if deployment == "PER_SHARD_V1":
        trainer.evaluate(noting)
        assert asked == [("eval", runs.BATCH, NUM_DEVICES)]
        return
    trainer.train(noting, steps=5)
    size = runs.BATCH if deployment == "PER_HOST_V1" else runs.BATCH // NUM_DEVICES
    assert asked == [("train", size, NUM_DEVICES)]
    rows = [item["row"] for item in runs.RECORDS]
    assert rows == [item["row"] for item in one_device["plain"]["records"][:5]]
    assert math.isfinite(runs.RECORDS[-1]["loss"])


def test_the_first_trainer_made_the_devices():
    assert os.environ["CPU_NUM_DEVICES"] == str(NUM_DEVICES)
