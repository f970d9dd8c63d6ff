"""The estimate before a run beside what the run then takes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.training.estimating import estimate
from isogrid.training.memory import peak_bytes, tensor_bytes
from isogrid.training.optimizers import make_optimizer
from tests.training.test_blockwise import made


@pytest.mark.parametrize("kind", ["full", "checkpointed", "scales"])
def test_memory_is_within_15_percent_of_what_is_measured(kind: str) -> None:
    model, _ = made()
    model.train()
    if kind == "checkpointed":
        ig.checkpoint_activations(model)
    if kind == "scales":
        ig.freeze_codes(model)
    ids = torch.randint(0, 32, (12, 64))

    def loss(count: int) -> Tensor:
        return F.cross_entropy(model(ids[:count]).flatten(0, 1), ids[:count].flatten() % 8)

    before = copy.deepcopy(model.state_dict())
    found = estimate(model, loss, batch_size=12, steps=3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer = make_optimizer("adamw", ig.parameter_groups(model, lr=1e-4))

    def run() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            loss(12).backward()
            optimizer.step()

    measured = peak_bytes(run) + tensor_bytes([*model.parameters(), *model.buffers()])
    assert abs(found.peak - measured) < 0.15 * measured, (found, measured)


def test_a_frozen_model_has_nothing_to_train() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(PlanError, match="nothing to train"):
        estimate(model, lambda count: model(torch.ones(count, 2)).sum(), 1, 1)
    with pytest.raises(PlanError, match="Unknown optimizer"):
        estimate(nn.Linear(2, 2), lambda count: torch.ones(()), 1, 1, optimizer="adamx")
