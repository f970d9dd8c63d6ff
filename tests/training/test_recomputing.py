"""Activation checkpointing and 8-bit optimizer states: the same losses, in less memory, also after a resume."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.training import load_training, save_training
from isogrid.training.memory import resting_bytes
from isogrid.training.optimizers import make_optimizer
from tests.formats.helpers import assert_equal
from tests.training.test_blockwise import BATCHES, made


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    found = []
    model.train()
    for step in steps:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(BATCHES[step % 4]).flatten(0, 1), BATCHES[step % 4].flatten() % 8)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize("scheme", ["w2a16-asym", "q4_0"])
def test_losses_with_checkpointing_are_the_same(scheme: str) -> None:
    kept = 0

    def saved(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    found, sizes = [], []
    for recomputes in (False, True):
        model, _ = made(scheme)
        if recomputes:
            assert ig.checkpoint_activations(model) == ("blocks.0", "blocks.1", "blocks.2")
            ig.checkpoint_activations(model)  # once is enough
        optimizer = make_optimizer("adamw", ig.parameter_groups(model, lr=1e-3))
        kept = 0
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            model(BATCHES[0])
        sizes.append(kept)
        found.append(torch.stack(losses(model, optimizer, range(4))))
        assert_equal(copy.deepcopy(model).eval()(BATCHES[0]), ig.convert(model)(BATCHES[0]))
    assert_equal(found[0], found[1])
    assert sizes[1] < 0.2 * sizes[0]


def one_layer() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    rules = [ig.Rule(match="0", range="minmax")]
    return ig.prepare(model, ig.plan(model, scheme="q4_0", rules=rules, example_inputs=(torch.zeros(1, 64),)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def test_moments_of_8_bits_resume_with_the_same_weights(tmp_path: Path) -> None:
    model = one_layer()
    optimizer = make_optimizer("adamw8bit", ig.parameter_groups(model, lr=1e-3, scale_lr=1e-3))
    train(model, optimizer, range(2))
    save_training(tmp_path, model, optimizer, {"step": 2})
    # Two moments of a byte a weight and a scale for 256 each, two tables, and float32 moments of the few scales.
    moments = resting_bytes(model, optimizer) - resting_bytes(model)
    assert moments <= 2 * (4096 + 4 * 16) + 2 * 4 * 256 + 2 * 4 * 128 + 64
    train(model, optimizer, range(2, 4))

    again = one_layer()
    resumed = make_optimizer("adamw8bit", ig.parameter_groups(again, lr=1e-3, scale_lr=1e-3))
    assert load_training(tmp_path, again, resumed) == {"step": 2}
    train(again, resumed, range(2, 4))
    for name, tensor in again.state_dict().items():
        assert_equal(tensor, model.state_dict()[name])
