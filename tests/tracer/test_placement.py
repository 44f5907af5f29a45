import pytest
import torch
from torch import nn

from tpuspec.placement import module_as_before, move_module


class Tied(nn.Module):
    """An embedding tied to a head, one buffer under two names, one module under two names, and a weight of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.blocks[1].bias = self.blocks[0].bias
        self.block_again = self.blocks[0]
        self.register_buffer("scale", torch.arange(3.0))
        self.blocks[1].register_buffer("scale", self.scale, persistent=False)
        self.register_buffer("nothing", None)

    def ties(self):
        return [self.embedding.weight is self.head.weight, self.blocks[0].bias is self.blocks[1].bias,
                self.scale is self.blocks[1].scale, self.block_again is self.blocks[0]]


def xla_device():
    torch_xla = pytest.importorskip("torch_xla")
    return torch_xla.device()


def devices():
    return [pytest.param(lambda: torch.device("meta"), id="meta"), pytest.param(xla_device, id="xla")]


@pytest.mark.parametrize("make_device", devices())
def test_moving_as_torch_does_unties_what_is_tied(make_device):
    # If this fails, torch keeps ties by itself, and move_module is no longer needed.
    assert Tied().to(make_device()).ties() == [False, False, False, True]


@pytest.mark.parametrize("make_device", devices())
def test_tied_parameters_and_buffers_stay_tied(make_device):
    device = make_device()
    module = Tied()
    assert move_module(module, device) is module
    assert module.ties() == [True] * 4
    assert {tensor.device.type for tensor in [*module.parameters(), *module.buffers()]} == {device.type}


@pytest.mark.parametrize("make_device", devices())
def test_what_was_apart_stays_apart_and_parameters_stay_parameters(make_device):
    module = move_module(Tied(), make_device())
    assert module.blocks[0].weight is not module.blocks[1].weight
    assert len(list(module.parameters())) == len(list(Tied().parameters())) == 5
    assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())
    assert list(module.state_dict()) == list(Tied().state_dict())
    assert module.nothing is None


def test_values_and_frozen_parameters_are_kept_on_the_device():
    module = Tied()
    module.embedding.weight.requires_grad_(False)
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    move_module(module, xla_device())
    assert not module.head.weight.requires_grad
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.cpu(), expected[name]), name


def test_an_update_of_one_name_shows_under_the_other():
    module = move_module(Tied(), xla_device())
    with torch.no_grad():
        module.embedding.weight.fill_(3.0)
    assert (module.head.weight.cpu() == 3.0).all()
    assert module.head(torch.ones(1, 3).to(module.head.weight.device)).shape == (1, 5)


def test_on_the_same_device_the_very_parameters_are_kept():
    module = Tied()
    before = list(module.parameters())
    move_module(module, torch.device("cpu"))
    assert all(old is new for old, new in zip(before, module.parameters(), strict=True))


def test_a_pass_in_between_leaves_buffers_and_gradients_as_they_were():
    class Replacing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = self.seen + 1  # another tensor under the same name
            return self.norm(x)

    module = Replacing()
    seen, before = module.seen, {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with module_as_before(module):
        module(torch.randn(8, 2)).sum().backward()
        assert module.seen is not seen
        assert not torch.equal(module.norm.running_mean, before["norm.running_mean"])
    assert module.seen is seen
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
