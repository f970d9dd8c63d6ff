"""The quantizer's state: created up front, positive, saved, sharded, and float32 whatever the model is."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import NotCalibratedError, PlanError
from isogrid.formats import Affine, named_format
from isogrid.quantizers import LSQ, MSE, AbsMax, MinMax, MovingAverage, Quantizer, ScaleRule, StraightThrough
from tests.formats.helpers import assert_equal

RULES: list[ScaleRule] = ["learned", "frozen", "moving", "dynamic"]


def weight_quantizer(name: str = "int4/group32", rule: ScaleRule = "learned") -> Quantizer:
    return Quantizer(named_format(name), (4, 64), AbsMax(), LSQ(), rule)


def activation_quantizer(rule: ScaleRule = "learned") -> Quantizer:
    return Quantizer(named_format("uint8/tensor"), (1,), MovingAverage(), LSQ(), rule, observes=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["int4/group32", "uint8/tensor", "q4_1", "nf4"])
def test_all_state_is_there_from_the_start_and_at_least_one_dimensional(name: str, rule: ScaleRule) -> None:
    quantizer = Quantizer(
        named_format(name), (4, 256), MSE(), LSQ(), rule, observes=rule == "moving" and "tensor" in name
    )
    before = {key: (value.shape, value.dtype) for key, value in quantizer.state_dict().items()}
    quantizer.fit(torch.randn(4, 256))
    quantizer(torch.randn(4, 256)).sum()
    assert {key: (value.shape, value.dtype) for key, value in quantizer.state_dict().items()} == before
    assert all(len(shape) >= 1 for shape, _ in before.values())
    learned = {"raw_scale", "offset"} & set(before) if rule == "learned" else set()
    assert {n for n, _ in quantizer.named_parameters()} == learned


@pytest.mark.parametrize("rule", RULES)
def test_state_makes_a_strict_round_trip_through_safetensors(rule: ScaleRule, tmp_path: Path) -> None:
    for make in (lambda: weight_quantizer(rule=rule), lambda: activation_quantizer(rule)):
        x, quantizer, restored = torch.randn(4, 64), make(), make()
        quantizer.observing = True
        quantizer.observe(x)
        quantizer.fit_observed()
        quantizer.fit(x)
        save_file(quantizer.state_dict(), tmp_path / "state.safetensors")
        assert restored.is_calibrated == (rule == "dynamic")
        assert not restored.load_state_dict(load_file(tmp_path / "state.safetensors"), strict=True).missing_keys
        assert restored.is_calibrated
        assert_equal(restored(x).detach(), quantizer(x).detach())
        assert_equal(restored.quantize(x).codes, quantizer.quantize(x).codes)


def test_a_deep_copy_is_another_quantizer_with_the_same_numbers() -> None:
    quantizer, x = weight_quantizer(), torch.randn(4, 64)
    quantizer.fit(x)
    other = copy.deepcopy(quantizer)
    assert_equal(other(x).detach(), quantizer(x).detach())
    with torch.no_grad():
        other.raw_scale.mul_(2)
    assert not torch.equal(other(x), quantizer(x))


def test_codes_are_those_that_forward_used() -> None:
    for name in ("int4/group32", "q4_0", "q4_1", "nf4", "uint8/tensor"):
        quantizer, x = Quantizer(named_format(name), (4, 64), MSE(), LSQ(), "learned"), torch.randn(4, 64)
        quantizer.fit(x)
        assert_equal(quantizer.quantize(x).dequantize(), quantizer(x).detach())
        assert_equal(quantizer.quantize(x).affine.scale, quantizer.stored().scale)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("lr", [1.0, 1e3, 1e9])
def test_scales_stay_positive_under_any_learning_rate(optimizer: str, lr: float) -> None:
    torch.manual_seed(0)
    quantizer, x, target = weight_quantizer("int4/channel"), torch.randn(4, 64), torch.randn(4, 64)
    quantizer.fit(x)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    optimiser = kind(quantizer.parameters(), lr=lr)
    for _ in range(20):
        optimiser.zero_grad()
        y = quantizer(x)
        assert (quantizer.scale > 0).all() and (quantizer.stored().scale > 0).all()
        assert y.isfinite().all()
        (y - target).square().sum().backward()
        optimiser.step()


def test_a_scale_below_its_floor_climbs_back() -> None:
    quantizer, x = weight_quantizer("int4/channel"), torch.randn(4, 64)
    quantizer.fit(x)
    start = quantizer.scale.detach().clone()
    with torch.no_grad():
        quantizer.raw_scale.fill_(-0.05)
    assert_equal(quantizer.scale.detach(), start * 2.0**-10)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    assert (quantizer.raw_scale > 0.3 * start).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_stay_float32_in_a_half_precision_model(dtype: torch.dtype) -> None:
    quantizer, x = activation_quantizer(), torch.randn(4, 64)
    quantizer.set_affine(Affine(torch.tensor([0.1234567]), torch.tensor([201.0])))
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.to(dtype)
    for key, value in quantizer.state_dict().items():
        assert_equal(value, before[key])
    y = quantizer(x.to(dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert quantizer.raw_scale.grad.dtype == torch.float32


def test_no_range_is_an_error_that_says_what_to_do() -> None:
    for call in (lambda q: q(torch.ones(4, 64)), lambda q: q.quantize(torch.ones(4, 64))):
        with pytest.raises(NotCalibratedError, match=r"isogrid\.calibrate"):
            call(weight_quantizer())
    quantizer = activation_quantizer()
    with pytest.raises(NotCalibratedError):
        quantizer.fit_observed()
    quantizer.enabled = False
    x = torch.ones(3)
    assert quantizer(x) is x


def test_a_learned_scale_needs_an_estimator_that_learns_it() -> None:
    with pytest.raises(PlanError, match="Use the estimator 'lsq'"):
        Quantizer(named_format("int4/channel"), (4, 64), AbsMax(), StraightThrough(), "learned")
    with pytest.raises(PlanError, match="no scale"):
        Quantizer(named_format("bfloat16"), (4, 64), AbsMax(), LSQ(), "learned")


def test_a_frozen_range_gets_no_gradient_and_still_passes_one() -> None:
    quantizer, x = weight_quantizer(), torch.randn(4, 64, requires_grad=True)
    quantizer.fit(x)
    quantizer.range_is_frozen = True
    quantizer(x).sum().backward()
    assert quantizer.raw_scale.grad is None and x.grad.any()


def test_a_moving_range_follows_in_training_only() -> None:
    quantizer = Quantizer(named_format("uint8/tensor"), (1,), MinMax(), StraightThrough(), "moving", observes=True)
    quantizer.set_affine(Affine(torch.tensor([1.0]), torch.tensor([0.0])))
    x = torch.tensor([0.0, 2.55])
    assert_equal(quantizer.eval()(x), torch.tensor([0.0, 3.0]))
    assert_equal(quantizer.train()(x), x)
    quantizer.range_is_frozen = True
    assert_equal(quantizer(10 * x), x)


def test_a_dynamic_range_is_new_for_each_tensor() -> None:
    quantizer = Quantizer(named_format("int8/token"), (1,), AbsMax(), StraightThrough(), "dynamic")
    x = torch.tensor([[127.0, 0.4], [1.27, 0.004]])
    assert_equal(quantizer(x), named_format("int8/token").fake_quantize(x))


def layers(scheme: str = "w4a16") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(6, 64)
    ig.prepare(model, ig.plan(model, scheme=scheme, example_inputs=(x,)))
    return ig.calibrate(model, [x]).train(), x


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "w4a8-dynamic"])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_weight_bias_and_scale_all_learn(scheme: str, mode: str) -> None:
    model, x = layers(scheme)
    if mode == "bfloat16":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        loss = model(x).float().square().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(model: nn.Module, x: Tensor, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_distributed_data_parallel_trains_the_same(scheme: str) -> None:
    model, x = layers(scheme)
    expected = train(copy.deepcopy(model), x)
    assert train(nn.parallel.DistributedDataParallel(model), x) == expected


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_fully_sharded_data_parallel_trains_the_same(scheme: str) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model, x = layers(scheme)
    expected = train(copy.deepcopy(model), x)
    for layer in (model[0], model[2]):
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    assert train(model, x) == expected
    # A range that is set later finds its way into the shards.
    quantizer = model[0].weight_quantizer
    quantizer.set_affine(Affine(torch.full(quantizer.starting_scale.shape, 0.5)))
    assert (quantizer.raw_scale.full_tensor() == 0.5).all()
