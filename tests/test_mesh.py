"""The settings of a mesh: their forms, and that they do not contradict one another."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from tpuspec.config import TPUConfig
from tpuspec.errors import ConfigError
from tpuspec.mesh import check_batch_partitioner
from tpuspec.tracer.topology import mesh_axes, wanted_devices

MESH = {"data": 2, "model": 2}


@pytest.mark.parametrize(("settings", "match"), [
    ({"mesh": {}}, r"mesh must map names of axes to sizes, such as {data: 2, model: 2}; got {}"),
    ({"mesh": [2, 2]}, r"mesh must map names .* got \[2, 2\]"),
    ({"mesh": {"data": 0}}, "size of the mesh axis 'data' must be a positive int; got 0"),
    ({"mesh": {"data": True}}, "size of the mesh axis 'data' must be a positive int; got True"),
    ({"mesh": {2: 2}}, "an axis of the mesh must be a name such as 'data' or 'model'; got 2"),
    ({"mesh": MESH, "num_shards": 4}, r"both count replicas; got 4 and the mesh \(data: 2, model: 2\)"),
    ({"mesh": MESH, "num_cores_per_replica": 4}, "puts a replica on 2 devices, contradict each other"),
    ({"mesh": {"model": 2}, "fsdp": True}, "fsdp splits parameters over the mesh axis 'data', and the mesh"),
    ({"fsdp": "yes"}, "fsdp must be True or False; got 'yes'"),
    ({"sharding": {"a": ["model"]}}, "sharding names axes of a mesh, and there is none"),
    ({"mesh": MESH, "sharding": {}}, "sharding must map patterns of parameter names"),
    ({"mesh": MESH, "sharding": {"": ["model"]}}, "a sharding rule needs a pattern"),
    ({"mesh": MESH, "sharding": {"a": "model"}}, r"sharding\['a'\] must be a list with one entry a dimension"),
    ({"mesh": MESH, "sharding": {"a": [3]}}, r"takes a mesh axis, a list of axes, or null; got 3"),
    ({"mesh": MESH, "sharding": {"a": ["rows"]}}, r"names the axis 'rows'; the mesh has data, model"),
    ({"mesh": MESH, "sharding": {"a": ["model", "model"]}}, r"names the axis 'model' twice"),
    ({"mesh": MESH, "sharding": {"a": [None]}}, "splits no dimension"),
    ({"mesh": {"a": 2, "b": 2, "c": 2}, "sharding": {"w": [["a", "b"], "c"]}}, "over several axes and another one too"),
])
def test_a_setting_that_breaks_a_rule_is_told(settings, match):
    with pytest.raises(ConfigError, match=match):
        TPUConfig(**settings)


def test_an_axis_of_size_1_splits_nothing_and_is_no_reason_to_refuse():
    TPUConfig(mesh={"a": 2, "b": 2, "c": 1}, sharding={"w": [["a", "b"], "c"], "v": [["a", "c"], "b"]})


THREE = {"data": 2, "rows": 2, "columns": 2}


@pytest.mark.parametrize(("dims", "axes"), [
    ([1, 4], THREE), ([2, 2], THREE), ([1, 1, 4], THREE), ([2, 1, 2], THREE), ([4, 2], {"a": 2, "b": 2, "c": 2}),
    ([2, 4], {"a": 4, "b": 2})])
def test_a_batch_with_a_dim_over_several_axes_and_another_that_is_split_is_refused(dims, axes):
    with pytest.raises(ConfigError, match=r"splits one dimension of a tensor over several axes.*Give the cores"):
        check_batch_partitioner(dims, axes)


@pytest.mark.parametrize(("dims", "axes"), [
    ([4, 1], THREE), ([1, 2, 2], THREE), ([1, 4], {"data": 1, "a": 2, "b": 2}), ([2, 2], {"data": 2, "model": 4}),
    ([1, 4], {"data": 2, "model": 4, "one": 1}), ([2, 2, 2], {"a": 2, "b": 2, "c": 2})])
def test_a_batch_along_one_dim_or_with_an_axis_a_dim_is_not(dims, axes):
    check_batch_partitioner(dims, axes)


@pytest.mark.parametrize(("settings", "num_devices", "axes", "wanted"), [
    ({"mesh": MESH}, 4, MESH, 4),
    ({"mesh": {"model": 4}}, 4, {"model": 4}, 4),
    ({"num_cores_per_replica": 2}, 4, {"data": 2, "model": 2}, 2),
    ({"num_cores_per_replica": 2, "num_shards": 4}, 8, {"data": 4, "model": 2}, 8),
    ({"fsdp": True}, 4, {"data": 4}, None),
    ({"fsdp": True, "num_shards": 4}, 4, {"data": 4}, 4),
])
def test_settings_make_a_mesh_of_all_devices(settings, num_devices, axes, wanted):
    config = TPUConfig(**settings)
    assert config.is_spmd
    assert mesh_axes(config, num_devices=num_devices) == axes
    assert wanted_devices(config) == wanted


@pytest.mark.parametrize(("settings", "num_devices", "match"), [
    ({"mesh": MESH}, 8, r"mesh \(data: 2, model: 2\) needs 4 devices, and 8 are there"),
    ({"fsdp": True}, 1, "has one device there"),
    ({"num_cores_per_replica": 4}, 2, "at most the number of cores found, 2; got 4"),
])
def test_devices_that_do_not_make_the_mesh_are_told(settings, num_devices, match):
    with pytest.raises(ConfigError, match=match):
        mesh_axes(TPUConfig(**settings), num_devices=num_devices)


@pytest.mark.parametrize("settings", [{}, {"num_shards": 4}, {"num_cores_per_replica": 1}])
def test_replicas_of_one_core_need_no_mesh(settings):
    assert not TPUConfig(**settings).is_spmd


def test_a_mesh_and_its_rules_may_stand_in_a_yaml_file():
    text = "mesh: {data: 2, model: 2}\nsharding: {layers.*.weight: [model, null], out: [[data, model]]}\nfsdp: true"
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TPUConfig), OmegaConf.create(text)))
    assert (made.mesh, made.fsdp) == (MESH, True)
    assert made.sharding == {"layers.*.weight": ["model", None], "out": [["data", "model"]]}


def test_a_mesh_and_its_rules_may_be_given_on_the_command_line():
    config = OmegaConf.structured(TPUConfig)
    for key, value in {"mesh": MESH, "sharding": {"a.*": ["model", None]}}.items():
        OmegaConf.update(config, key, value, merge=True)  # as Hydra does it
    made = OmegaConf.to_object(config)
    assert (made.mesh, made.sharding) == (MESH, {"a.*": ["model", None]})
