"""Sharding rules and FSDP: which dims of which parameters are split, without devices."""

from __future__ import annotations

import re

import pytest

from tpuspec.errors import ConfigError
from tpuspec.tracer.sharding_rules import shard_parameters

AXES = {"data": 2, "model": 4}
SHAPES = {"layers.0.weight": (8, 16), "layers.0.bias": (8,), "layers.1.weight": (8, 8), "scale": (3,), "scalar": ()}


def shard(rules=None, *, fsdp=False, axes=AXES):
    specs = shard_parameters(SHAPES, axes, rules=rules, fsdp=fsdp)
    assert specs.keys() == SHAPES.keys()
    assert all(len(specs[name]) == len(shape) for name, shape in SHAPES.items())
    return {name: spec for name, spec in specs.items() if any(spec)}


def test_without_a_rule_everything_is_whole():
    assert shard() == {}


def test_a_pattern_matches_across_dots_and_the_first_rule_counts():
    assert shard({"layers.0.weight": [None, ["data", "model"]], "*.weight": ["model", None]}) == {
        "layers.0.weight": ((), ("data", "model")), "layers.1.weight": (("model",), ())}


def test_fsdp_splits_the_largest_dim_that_is_whole_and_divisible():
    assert shard({"layers.0.weight": [None, "model"]}, fsdp=True) == {
        "layers.0.weight": (("data",), ("model",)), "layers.0.bias": (("data",),), "layers.1.weight": (("data",), ())}


def test_fsdp_leaves_a_parameter_that_a_rule_splits_over_data():
    assert shard({"layers.1.weight": [None, "data"]}, fsdp=True)["layers.1.weight"] == ((), ("data",))


def test_fsdp_leaves_a_parameter_with_a_dim_that_a_rule_splits_over_several_axes():
    rules = {"layers.1.weight": [["rows", "columns"], None]}
    several = shard(rules, fsdp=True, axes={"data": 2, "rows": 2, "columns": 2})
    assert several["layers.1.weight"] == (("rows", "columns"), ())
    assert several["layers.0.weight"] == ((), ("data",))
    one = shard(rules, fsdp=True, axes={"data": 2, "rows": 2, "columns": 1})
    assert one["layers.1.weight"] == (("rows", "columns"), ("data",))


@pytest.mark.parametrize(("rules", "match"), [
    ({"layer.0.weight": ["model", None]}, "matches no parameter of the model; it has 5, such as layers.0.weight."),
    ({"*": ["model", None]}, "has 2 entries, one a dimension; it matches layers.0.bias, which has 1: shape [8]"),
    ({"scale": ["model"]}, "splits dimension 0 of scale, shape [3], in 4 (model: 4), which does not divide 3"),
    ({"layers.1.weight": [["data", "model"], None], "layers.0.weight": [None, "rows"]}, "names the axis 'rows'; the "
     "mesh has data, model"),
    ({"layers.*.weight": ["model", None], "layers.1.weight": [None, "model"]}, "has no effect: the rules before it"),
])
def test_a_rule_that_does_not_fit_is_told(rules, match):
    with pytest.raises(ConfigError, match=re.escape(match)):
        shard(rules)


def test_fsdp_with_nothing_to_split_is_told():
    with pytest.raises(ConfigError, match="fsdp has nothing to split: no parameter has a dimension that 7"):
        shard(fsdp=True, axes={"data": 7})
