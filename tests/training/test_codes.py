"""Scales trained over frozen codes: against closed forms, and against the layers that the codes were taken from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.layers.coded import CodedLinear
from isogrid.layers.stored import StoredLinear
from isogrid.training.checkpoint import load_training, save_training
from tests.formats.helpers import assert_equal

SCHEMES = ["w2a16-asym", "w3a16", "w4a16-asym", "q4_0", "q2_k", "q4_k", "q6_k", "tq2_0", "iq4_nl", "mxfp4", "q5_1"]


class Two(nn.Module):
    """Two layers, of which no head stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(256, 32), nn.Linear(32, 256), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()))


def prepared(scheme: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(4, 256)
    rules = [ig.Rule(match="second", keep="float"), ig.Rule(match="head", keep="float")]
    return ig.prepare(model, ig.plan(model, scheme=scheme, rules=rules, example_inputs=(x,))), x


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_changes_but_what_trains(scheme: str) -> None:
    model, x = prepared(scheme)
    before, converted = model(x).detach(), ig.convert(model)
    assert ig.freeze_codes(model) == {}
    assert isinstance(model.first, CodedLinear)
    assert_equal(model(x).detach(), before)
    assert_equal(ig.convert(model)(x), converted(x))
    old: StoredLinear = converted.first
    new: StoredLinear = ig.convert(model).first
    assert old.state_dict().keys() == new.state_dict().keys()
    for name, tensor in old.state_dict().items():
        assert_equal(new.state_dict()[name], tensor)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "first.weight_quantizer.raw_scale" in trainable
    assert trainable <= {"first.weight_quantizer.raw_scale", "first.weight_quantizer.offset"}


@pytest.mark.parametrize("scheme", ["w2a16-asym", "q4_0", "q5_1"])
def test_the_gradient_of_a_scale_is_what_its_codes_say(scheme: str) -> None:
    """d w^/d s = q - z and d w^/d o = 1, by autograd through s (q - z) + o written out."""
    model, x = prepared(scheme)
    ig.freeze_codes(model)
    upstream = torch.randn(4, 32)
    layer = model.first
    layer(x).backward(upstream)
    quantizer, stored = layer.weight_quantizer, layer.quantized
    groups = stored.codes.to(torch.float32).reshape(*stored.scale.codes.shape, -1)
    steps = groups if stored.zero_point is None else groups - stored.zero_point.dequantize().unsqueeze(-1)
    scale = stored.scale.dequantize().requires_grad_()
    offset = (torch.zeros_like(scale) if stored.offset is None else stored.offset.dequantize()).requires_grad_()
    weight = (steps * scale.unsqueeze(-1) + offset.unsqueeze(-1)).reshape(32, 256)
    # llama.cpp rounds the input to int8 first.
    rounded = x if layer.input_rule is None else layer.input_rule(x)
    (rounded @ weight.T).backward(upstream)
    # Sums over a group are taken in another order.
    torch.testing.assert_close(quantizer.raw_scale.grad, scale.grad, rtol=1e-4, atol=1e-3)
    if stored.offset is not None:
        torch.testing.assert_close(quantizer.offset.grad, offset.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scheme", ["w2a16-asym", "q2_k"])
def test_codes_stay_while_scales_train_and_the_loss_falls(scheme: str, tmp_path: Path) -> None:
    model, x = prepared(scheme)
    target = Two()(x).detach()
    ig.freeze_codes(model)
    codes = model.first.codes.clone()
    optimizer = torch.optim.Adam(ig.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert_equal(model.first.codes, codes)
    # What was trained is what is stored, and what a checkpoint brings back.
    assert_equal(ig.convert(model)(x), model.eval()(x).detach())
    ig.save(model, tmp_path)
    again = ig.restore(Two(), tmp_path)
    assert isinstance(again.first, CodedLinear)
    assert_equal(again.eval()(x).detach(), model(x).detach())


def test_a_float_weight_is_gone_from_memory() -> None:
    model, _ = prepared("w2a16-asym")
    size = sum(p.numel() * p.element_size() for p in model.first.parameters())
    ig.freeze_codes(model)
    tensors = [*model.first.parameters(), *model.first.buffers()]
    # 2 bits, and float32 scale, start and zero point for each group of 64, and a bias.
    assert sum(t.numel() * t.element_size() for t in tensors) == 32 * 256 // 4 + 3 * 4 * 32 * 4 + 32 * 4 + 1 + 4
    assert size > 5 * 32 * 256 / 2


def test_what_cannot_be_coded_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 64))
    ig.prepare(model, ig.plan(model, scheme="w8a8", example_inputs=(torch.zeros(1, 4, 4, 4),)))
    ig.calibrate(model, [torch.randn(2, 4, 4, 4)])
    left = ig.freeze_codes(model)
    assert left == {
        "0": "only a prepared torch.nn.Linear can",
        "2": "its arithmetic is on integers, whose scales follow the activations",
    }
    assert not model[2].weight.requires_grad
    frozen = nn.Sequential(nn.Linear(64, 64))
    rules = [ig.Rule(match="0", scale="frozen")]
    ig.prepare(frozen, ig.plan(frozen, scheme="q4_0", rules=rules, example_inputs=(torch.zeros(1, 64),)))
    with pytest.raises(PlanError, match="nothing to train"):
        ig.freeze_codes(frozen)


class Three(nn.Module):
    """Two blocks of two layers, a norm between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.norm(x + block(x))
        return self.head(x)


def three() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Three(), torch.randn(8, 64)
    return ig.prepare(model, ig.plan(model, scheme="q4_0", example_inputs=(x,))), x


def training(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


BLOCK = {f"blocks.1.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias", "weight_quantizer.raw_scale")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"match": "blocks.0", "scales": False}, BLOCK | {"norm.weight", "norm.bias"}),
        ({"match": "re:blocks.0.\\d|norm", "scales": False}, BLOCK),
        ({"match": ["blocks.0.*", "norm"]}, BLOCK | {f"blocks.0.{n}.weight_quantizer.raw_scale" for n in (0, 2)}),
        ({"exclude": "blocks.1", "scales": False}, BLOCK),
        ({"match": "*", "exclude": ["blocks.1", "norm"], "scales": False}, BLOCK | {"norm.weight", "norm.bias"}),
    ],
)
def test_a_part_freezes_and_the_rest_trains(options: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    model, x = three()
    before = model(x).detach()
    left = ig.freeze_codes(model, **options)
    assert_equal(model(x).detach(), before)
    assert isinstance(model.blocks[0][0], CodedLinear)
    assert not isinstance(model.blocks[1][0], CodedLinear)
    found = {name for name in training(model) if not name.startswith("head.")}
    assert found == expected, left
    codes = model.blocks[0][0].codes.clone()
    scale = model.blocks[0][0].weight_quantizer.raw_scale.detach().clone()
    optimizer = torch.optim.AdamW(ig.parameter_groups(model, lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert_equal(model.blocks[0][0].codes, codes)
    moved = "blocks.0.0.weight_quantizer.raw_scale" in expected
    assert torch.equal(model.blocks[0][0].weight_quantizer.raw_scale, scale) != moved
    # What was trained is what is deployed, and what a checkpoint brings back and goes on with.
    served = ig.convert(model)(x)
    assert_equal(served, model.eval()(x).detach())
    save_training(tmp_path, model, optimizer, {"step": 3})
    again = ig.restore(Three(), tmp_path)
    assert training(again) == training(model)
    assert_equal(ig.convert(again)(x), served)
    resumed = torch.optim.AdamW(ig.parameter_groups(again, lr=1e-2))
    assert load_training(tmp_path, again, resumed) == {"step": 3}
    for some, stepper in ((model, optimizer), (again, resumed)):
        some.train()
        stepper.zero_grad()
        some(x).square().mean().backward()
        stepper.step()
    assert_equal(again(x).detach(), model(x).detach())


def test_frozen_stays_frozen_when_more_is_frozen() -> None:
    model, x = three()
    before = model(x).detach()
    ig.freeze_codes(model, match="blocks.0", scales=False)
    ig.freeze_codes(model, match="blocks.1", scales=False)
    assert_equal(model(x).detach(), before)
    assert {name for name in training(model) if name.startswith("blocks")} == set()


def test_a_weight_that_another_layer_reads_trains_on() -> None:
    model, x = Three(), torch.randn(8, 64)
    model.blocks[1][0].weight = model.blocks[0][0].weight
    ig.prepare(model, ig.plan(model, scheme="q4_0", example_inputs=(x,)))
    left = ig.freeze_codes(model, match="blocks.0", scales=False)
    assert left == {"blocks.0.0": "another layer reads the same weight"}
    assert "blocks.0.0.weight" in training(model)


def test_names_that_match_nothing_are_said() -> None:
    model, _ = three()
    with pytest.raises(PlanError, match=r"'blok.*' matches no module. Did you mean 'blocks"):
        ig.freeze_codes(model, match="blok.*")
    with pytest.raises(PlanError, match="'tail' matches no module"):
        ig.freeze_codes(model, exclude="tail")
    with pytest.raises(PlanError, match=r"nothing to train.*exclude="):
        ig.freeze_codes(model, scales=False)
    assert not any(isinstance(module, CodedLinear) for module in model.modules())
