"""Optimizers by name, and steps that are taken in the middle of backward."""

import copy

import pytest
import torch
from torch import Tensor, nn

from isogrid.training.memory import peak_bytes
from isogrid.training.optimizers import make_optimizer, stepping_in_backward
from tests.formats.helpers import assert_equal


class Shared(nn.Module):
    """Six layers over four weights: what is read twice is moved once, when both readers' gradients are there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0], self.layers[2]):
            x = torch.tanh(layer(x))
        return x.square().mean()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_steps_in_backward_come_to_what_steps_after_it_do(name: str) -> None:
    torch.manual_seed(0)
    one = Shared()
    other = copy.deepcopy(one)
    batches = torch.randn(4, 2, 64)
    optimizer = make_optimizer(name, [{"params": list(one.parameters()), "lr": 1e-2, "weight_decay": 0.1}])
    for batch in batches:
        optimizer.zero_grad()
        one(batch).backward()
        optimizer.step()
    optimizer = make_optimizer(name, [{"params": list(other.parameters()), "lr": 1e-2, "weight_decay": 0.1}])
    with stepping_in_backward(optimizer):
        for batch in batches:
            other(batch).backward()
            assert all(parameter.grad is None for parameter in other.parameters())
    for parameter, expected in zip(other.parameters(), one.parameters(), strict=True):
        assert_equal(parameter.detach(), expected.detach())
    other(batches[0]).backward()  # nothing moves by itself any more
    assert all(parameter.grad is not None for parameter in other.parameters())


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_a_step_makes_nothing_on_the_way(name: str) -> None:
    parameters = [nn.Parameter(torch.zeros(64, 64)) for _ in range(3)]
    optimizer = make_optimizer(name, [{"params": parameters, "lr": 1e-2}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert peak_bytes(optimizer.step) < 3 * (2 * 64 * 64 * 4) + 1024  # the two moments, in the first step
    assert peak_bytes(optimizer.step) < 1024
