"""Rotations: they cancel out, spread outliers, and are kept by what is exported."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Generator, nn

import isogrid as ig
from isogrid.errors import CheckpointError, NonFiniteError, NotCalibratedError, PlanError, TargetError
from isogrid.initialization.learning import cayley_step
from isogrid.initialization.orthogonal import random_rotation, rotation_around_the_mean
from isogrid.layers.hadamard import HadamardLinear, hadamard_matrix, turned
from tests.initialization.networks import batch, network


@pytest.mark.parametrize("size", [1, 2, 64])
def test_hadamard_matrices_are_those_of_scipy(size: int) -> None:
    assert np.array_equal(hadamard_matrix(size).numpy(), scipy.linalg.hadamard(size))
    x = torch.randn(5, 2 * size, generator=Generator().manual_seed(0), dtype=torch.float64)
    expected = x @ torch.block_diag(hadamard_matrix(size), hadamard_matrix(size)) / size**0.5
    torch.testing.assert_close(turned(x, size), expected)
    torch.testing.assert_close(turned(turned(x, size), size), x)


def test_a_size_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(PlanError, match="power of two"):
        hadamard_matrix(12)
    with pytest.raises(PlanError, match="32 or less"):
        HadamardLinear(96, 4, block=64)


@pytest.mark.parametrize("size", [2, 12, 64, 7])
@pytest.mark.parametrize("make", [random_rotation, rotation_around_the_mean])
def test_rotations_are_orthogonal_and_mix(make: Any, size: int) -> None:
    turn = make(size, Generator().manual_seed(0))
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64))
    if make is rotation_around_the_mean:
        ones = torch.ones(size, dtype=torch.float64)
        torch.testing.assert_close(turn @ ones, ones)


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_the_model_computes_what_it_did_on_smaller_activations(norm: Any) -> None:
    model, x = network(norm), batch()
    before, stream = model(x), model[1](model[0](x))
    found = ig.rotate(model, example_inputs=(x,), online="*.down")
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    after = model[1](model[0](x))
    torch.testing.assert_close(after.norm(dim=-1), stream.norm(dim=-1), rtol=1e-4, atol=1e-4)
    assert after.abs().max() < 0.7 * stream.abs().max()
    assert [what for what, *_ in found.changed] == ["turned", "turned online", "turned online"]
    assert isinstance(model[1].down, HadamardLinear)


def test_it_quantises_better() -> None:
    def error(model: nn.Module) -> float:
        before = model(batch())
        rules = [ig.Rule(match="*", activation="uint4/tensor")]
        plan = ig.plan(model, scheme="w8a8", rules=rules, example_inputs=(batch(),))
        ig.calibrate(ig.prepare(model, plan), [batch()])
        return float((model.eval()(batch()) - before).detach().square().mean())

    rotated = network()
    ig.rotate(rotated, example_inputs=(batch(),), online="*.down")
    assert error(rotated) < 0.6 * error(network())


def test_online_rotations_are_kept_through_export(tmp_path: Path) -> None:
    model, x = network(), batch(8)
    ig.rotate(model, example_inputs=(x,), online="*.down")
    plan = ig.plan(model, scheme="w8a8", example_inputs=(x,))
    ig.calibrate(ig.prepare(model, plan), [x])
    report = ig.verify(model, ig.export(model, tmp_path / "model.onnx"), [x])
    assert report, report
    ig.save(model, tmp_path / "checkpoint")
    again = network()
    with pytest.raises(CheckpointError, match="hadamard"):
        ig.restore(network(), tmp_path / "checkpoint")
    ig.rotate(again, example_inputs=(x,), online="*.down")
    assert torch.equal(ig.restore(again, tmp_path / "checkpoint").eval()(x), model.eval()(x))


@pytest.mark.parametrize("target", ["llamacpp", "vllm", "bitsandbytes"])
def test_targets_that_cannot_rotate_say_so(target: str) -> None:
    model, x = network(), batch()
    ig.rotate(model, example_inputs=(x,), online="*.down")
    scheme = {"llamacpp": "q8_0", "vllm": "w8a8-dynamic", "bitsandbytes": "nf4"}[target]
    with pytest.raises(TargetError, match="Rotate without online"):
        ig.plan(model, target, scheme, example_inputs=(x,))


def test_tied_embeddings_turn_once_or_say_what_to_do() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body, self.head = nn.Embedding(50, 64), network()[1:4], nn.Linear(64, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.table(ids)))

    model, ids = Language(), torch.arange(12).reshape(2, 6)
    with pytest.raises(PlanError, match="shares its weight with an embedding"):
        ig.rotate(model, example_inputs=(ids,))
    nn.init.ones_(model.body[2].weight)
    before = model(ids)
    ig.rotate(model, example_inputs=(ids,))
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)
    assert model.head.weight is model.table.weight


def test_bad_input_is_refused() -> None:
    model, x = network(), batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match="is the name of no"):
        ig.rotate(model, example_inputs=(x,), online="*.dawn")
    with pytest.raises(PlanError, match="no space of the model"):
        ig.rotate(model, example_inputs=(x,), rotations={"1": torch.eye(64)})
    with pytest.raises(PlanError, match="not an orthogonal matrix"):
        ig.rotate(model, example_inputs=(x,), rotations={"0": torch.ones(64, 64)})
    with pytest.raises(PlanError, match="Nothing in the model can be turned"):
        ig.rotate(nn.Linear(32, 2), example_inputs=(x,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_cayley_steps_descend_on_orthogonal_matrices() -> None:
    wanted, rotation = (random_rotation(7, Generator().manual_seed(seed)) for seed in (3, 4))
    wanted[0] *= torch.linalg.det(wanted @ rotation).sign()  # no path leads to reflections
    losses = []
    for _ in range(60):
        losses.append(float((rotation - wanted).square().sum()))
        rotation = cayley_step(rotation, 2 * (rotation - wanted), lr=0.5)
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(7, dtype=torch.float64))


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_learned_rotations_are_better_than_random_ones(norm: Any) -> None:
    model, x = network(norm), batch()
    labels = model(x).detach()
    plan = ig.plan(model, scheme="8da4w", rules=[ig.Rule(match="*", range="absmax")], example_inputs=(x,))

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, labels)

    def after(rotations: Any) -> float:
        rotated = network(norm)
        ig.rotate(rotated, example_inputs=(x,), rotations=rotations)
        return float(loss(ig.prepare(rotated, plan).eval()(x), x).detach())

    found = ig.learn_rotations(model, plan, [x], loss, example_inputs=(x,), steps=10)
    assert after(found) < after({})


def test_bad_input_to_learning_is_refused() -> None:
    model, x = network(), batch()
    plan = ig.plan(model, scheme="8da4w", example_inputs=(x,))
    with pytest.raises(NotCalibratedError, match="no batch"):
        ig.learn_rotations(model, plan, [], lambda y, x: y.sum(), example_inputs=(x,))
    with pytest.raises(NotCalibratedError, match="Batch 1 is empty"):
        ig.learn_rotations(model, plan, [x, x[:0]], lambda y, x: y.sum(), example_inputs=(x,))
    with pytest.raises(NonFiniteError, match="smaller lr"):
        ig.learn_rotations(model, plan, [x], lambda y, x: y.sum() * torch.nan, example_inputs=(x,))
