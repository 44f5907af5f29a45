"""A sample of `make plans`, which compiles all recipes in all layouts for both generations."""

from __future__ import annotations

from tests.plan import recipes


def test_a_recipe_compiles_as_a_mesh_for_two_generations_in_all_modes():
    plans = recipes.plan("tabular", "mesh")
    assert [(plan["topology"], mode["mode"], mode["fits"]) for plan in plans for mode in plan["modes"]] == [
        (topology, mode, True) for topology in recipes.TOPOLOGIES for mode in recipes.MODES]
