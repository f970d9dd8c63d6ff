"""The estimate before a run beside what the run then takes."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.training import estimating
from isogrid.training.estimating import estimate
from isogrid.training.memory import peak_bytes, tensor_bytes
from isogrid.training.optimizers import make_optimizer
from tests.training.test_blockwise import made


@pytest.mark.parametrize(
    ("kind", "optimizer", "accumulation"),
    [("full", "adamw", 1), ("full", "adamw", 2), ("full", "sgd", 1), ("checkpointed", "adamw", 1),
     ("scales", "adamw", 1), ("l4q", "adamw", 2)],
)  # fmt: skip
def test_memory_is_what_is_measured(kind: str, optimizer: str, accumulation: int) -> None:
    """The documentation says within 15 %; what is counted and continued here comes within 1 %."""
    model, _ = made()
    model.train()
    if kind == "checkpointed":
        ig.checkpoint_activations(model)
    if kind == "scales":
        ig.freeze_codes(model)
    if kind == "l4q":
        ig.add_adapters(model, rank=4)
    ids = torch.randint(0, 32, (12, 64))

    def loss(count: int) -> Tensor:
        return F.cross_entropy(model(ids[:count]).flatten(0, 1), ids[:count].flatten() % 8)

    before = copy.deepcopy(model.state_dict())
    found = estimate(model, loss, batch_size=12, steps=3, optimizer=optimizer, accumulation=accumulation)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    stepper = make_optimizer(optimizer, ig.parameter_groups(model, lr=1e-4))

    def run() -> None:
        for _ in range(3):
            stepper.zero_grad()
            for _ in range(accumulation):
                loss(12).backward()
            stepper.step()

    measured = peak_bytes(run) + tensor_bytes([*model.parameters(), *model.buffers()])
    assert abs(found.peak - measured) < 0.01 * measured, (found, measured)


def test_time_is_that_of_examples_of_weights_and_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock for which a forward and backward takes 5 s and 2 s an example, and the optimizer 1 s a layer."""
    passed: list[int] = []

    def seconds(function: Callable[[], object], device: torch.device | None) -> float:
        passed.clear()
        function()
        return 5.0 + 2.0 * passed[0] if passed else 1.0

    monkeypatch.setattr(estimating, "_seconds", seconds)
    model = nn.Linear(2, 2, bias=False)

    def loss(count: int) -> Tensor:
        passed.append(count)
        return model(torch.ones(count, 2)).sum()

    assert estimate(model, loss, batch_size=16, steps=10).seconds == 10 * (5 + 2 * 16 + 1)
    assert estimate(model, loss, batch_size=16, steps=10, accumulation=3).seconds == 10 * (3 * (5 + 2 * 16) + 1)
    assert estimate(model, loss, batch_size=1, steps=1).seconds == 5 + 2 + 1


def test_a_frozen_model_has_nothing_to_train() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(PlanError, match="nothing to train"):
        estimate(model, lambda count: model(torch.ones(count, 2)).sum(), 1, 1)
    with pytest.raises(PlanError, match="Unknown optimizer"):
        estimate(nn.Linear(2, 2), lambda count: torch.ones(()), 1, 1, optimizer="adamx")
