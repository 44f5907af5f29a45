import pytest
import torch
from torch import nn

from tpuspec.checkpoint.restore import list_mismatches, load_into_module
from tpuspec.errors import CheckpointError


def _module() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        for value in module.state_dict().values():
            value.zero_()
    return module


def test_all_values_are_loaded_buffers_too():
    module = _module()
    tensors = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
    load_into_module(module, tensors)
    assert all(bool((value == 1).all()) for value in module.state_dict().values())


def test_a_mismatch_lists_every_name_and_loads_nothing():
    module = _module()
    tensors = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
    del tensors["0.bias"], tensors["1.weight"]
    tensors |= {"0.weight": torch.ones(3, 5), "1.bias": torch.ones(()), "head.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"Restoring from checkpoint failed.*a mismatch") as caught:
        load_into_module(module, tensors)
    for line in ("missing in the checkpoint: 0.bias", "missing in the checkpoint: 1.weight",
                 "not in the model: head.weight",
                 "0.weight is [3, 5] in the checkpoint, [3, 2] in the model",
                 "1.bias is [] in the checkpoint, [3] in the model"):
        assert line in str(caught.value)
    assert all(bool((value == 0).all()) for value in module.state_dict().values())


def test_tied_weights_are_loaded_under_both_names():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    load_into_module(module, {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)})
    assert module[0].weight is module[1].weight
    assert torch.equal(module.state_dict()["0.weight"], torch.ones(2, 2))


def test_what_load_state_dict_itself_refuses_is_a_checkpoint_error():
    class Stubborn(nn.Linear):
        def _load_from_state_dict(self, *args, **kwargs):
            args[-1].append("not today")

    module = Stubborn(1, 1)
    with pytest.raises(CheckpointError, match=r"(?s)failed in Stubborn: .*not today") as caught:
        load_into_module(module, module.state_dict())
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_equal_names_and_shapes_have_no_mismatch():
    assert list_mismatches({"a": torch.ones(2)}, {"a": torch.zeros(2, dtype=torch.bfloat16)}) == []
