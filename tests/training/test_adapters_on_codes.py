"""Adapters over weights that are kept as codes: QA-LoRA merges exactly, QLoRA does not and says so."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.formats import named_format
from isogrid.layers.coded import CodedLinear
from isogrid.layers.weights import base_of, weight_of
from isogrid.planning.state import prepared_state
from isogrid.quantizers import LSQ, MSE, Quantizer
from isogrid.training.loftq import alternate
from tests.models import assert_equal


def float_model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    return model, torch.randn(8, 256)


def prepared(scheme: str) -> tuple[nn.Module, Tensor]:
    model, x = float_model()
    rules = [ig.Rule(match="re:[24]", keep="float")]
    return ig.prepare(model, ig.plan(model, scheme=scheme, rules=rules, example_inputs=(x,))), x


def fine_tune(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(ig.parameter_groups(model, lr=0.02))
    for _ in range(steps):
        optimizer.zero_grad()
        (model.train()(x) - 1).square().mean().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("scheme", ["q4_1", "q5_1", "q4_k", "w4a16-asym", "w2a16-asym"])
def test_qa_lora_merges_exactly(scheme: str) -> None:
    model, x = prepared(scheme)
    before = model(x).detach()
    report = ig.add_adapters(model, rank=2, alpha=200 if "asym" in scheme else 4, method="qa-lora")
    assert report.merges_exactly and report.scales == 0
    assert_equal(model(x).detach(), before)
    fine_tune(model, x)
    trained = model(x).detach()
    assert not torch.equal(trained, before)
    integer = ig.convert(model)
    assert_equal(integer(x), trained)
    assert str(ig.merge_difference(model, [x])).startswith("Merged and served: equal")
    merged = ig.merge_adapters(copy.deepcopy(model))
    assert_equal(merged(x).detach(), trained)
    for name, tensor in ig.convert(merged).state_dict().items():
        assert_equal(tensor, integer.state_dict()[name])


def test_the_update_of_qa_lora_is_that_of_pooled_inputs() -> None:
    """The paper's formula: Q(W)x + s·B A pool(x), with sums over groups; its gradients too."""
    model, x = prepared("w4a16-asym")
    ig.add_adapters(model, rank=2, alpha=4, method="qa-lora")
    layer = model[0]
    float32 = named_format("float32")  # as the paper has it: nothing is rounded when stored
    layer.weight_quantizer.format = replace(layer.weight_quantizer.format, scale=float32, zero_point=float32)
    adapter = layer.adapters["default"]
    adapter.B.data.normal_()
    upstream = torch.randn(8, 64)
    layer(x).backward(upstream)
    a, b = (p.detach().clone().requires_grad_() for p in (adapter.A, adapter.B))
    plain = layer.weight_quantizer.affine()
    base = (layer.quantized.codes.reshape(64, 2, 128) - plain.zero_point.unsqueeze(-1)) * plain.scale.unsqueeze(-1)
    expected = F.linear(x, base.flatten(1).detach(), layer.bias) + 2.0 * x.reshape(8, 2, 128).sum(-1) @ (b @ a).T
    expected.backward(upstream)
    # Sums are added up in another order.
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.A.grad, a.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(adapter.B.grad, b.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scheme", ["nf4-double", "w4a16"])
def test_qlora_says_that_it_does_not_merge_exactly(scheme: str) -> None:
    model, x = prepared(scheme)
    stored = ig.convert(model)[0].weight
    report = ig.add_adapters(model, rank=4, alpha=8, method="qlora")
    assert not report.merges_exactly and "NOT what was trained" in str(report) and report.scales == 0
    assert isinstance(model[0], CodedLinear)
    assert_equal(base_of(model[0]), stored)
    fine_tune(model, x)
    adapter = model[0].adapters["default"]
    beside = F.linear(F.linear(x, adapter.A), adapter.B) * 2.0
    assert_equal(model[0](x).detach(), (F.linear(x, stored, model[0].bias) + beside).detach())
    with pytest.raises(PlanError, match=r"no grid holds their sum.*merge_adapters"):
        ig.convert(model)
    difference = ig.merge_difference(model, [x])
    assert "No grid holds the sum" in str(difference) and difference.result.max_difference > 0
    merged = weight_of(model[0]).detach()
    served = ig.merge_adapters(model)
    quantizer = served[0].weight_quantizer
    assert_equal(served[0].weight.detach(), merged)
    assert_equal(ig.convert(served)[0].weight, quantizer.quantize(merged).dequantize())


def test_what_was_merged_by_quantising_anew_is_verified_with_a_note(tmp_path: Path) -> None:
    for method in ("l4q", "qlora"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        x = torch.randn(4, 64)
        ig.prepare(model, ig.plan(model, scheme="w4a16", example_inputs=(x,)))
        ig.add_adapters(model, rank=2, method=method)
        fine_tune(model, x)
        ig.save(ig.merge_adapters(model), tmp_path / method)
        again = ig.restore(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), tmp_path / method)
        assert prepared_state(again).requantized == (("default",) if method == "qlora" else ())
        report = ig.verify(again, ig.export(again, tmp_path / f"{method}.onnx"), [x])
        assert report and ["merging default (qlora)" in note for note in report.notes] == [True] * (method == "qlora")
        assert ("NOTE: the artefact" in str(report)) == (method == "qlora")


def test_qlora_keeps_four_bits_of_a_weight() -> None:
    model, _ = prepared("nf4-double")
    ig.add_adapters(model, rank=4, method="qlora")
    assert model[0].codes.dtype == torch.uint8 and model[0].codes.numel() == 256 * 64 // 2
    assert "0.weight" not in dict(model.named_parameters())


def test_loftq_begins_with_less_error() -> None:
    plain, x = float_model()
    expected = plain[0](x)
    errors = {}
    for start in ("zero", "loftq"):
        model, _ = prepared("nf4-double")
        ig.add_adapters(model, rank=16, alpha=32, method="qlora", start=start)
        errors[start] = float((model[0](x) - expected).detach().square().mean())
    assert errors["loftq"] < 0.8 * errors["zero"]


def test_the_first_turn_of_loftq_is_the_best_low_rank_approximation() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    quantizer = Quantizer(named_format("int2/group32"), (48, 64), MSE(), LSQ(), "frozen")
    quantizer.fit(weight)
    missing = weight - quantizer.quantize(weight).dequantize()
    values = torch.linalg.svdvals(missing)
    *_, errors = alternate(weight, quantizer, rank=8, scaling=3.0)
    # Eckart and Young: what is left are the other singular values; a sum in another order.
    torch.testing.assert_close(errors[0], float(values[8:].square().sum().sqrt()), rtol=1e-4, atol=0.0)
    assert errors == sorted(errors, reverse=True)


def test_importance_moves_the_error_away_from_what_counts() -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(48, 64), torch.ones(48, 64)
    importance[:4] = 1e4
    quantizer = Quantizer(named_format("int2/group32"), (48, 64), MSE(), LSQ(), "frozen")

    def error(weights: Tensor | None) -> float:
        rest, a, b, _ = alternate(weight, quantizer, rank=4, importance=weights)
        quantizer.fit(rest)
        return float((weight - quantizer.quantize(rest).dequantize() - b @ a)[:4].norm())

    assert error(importance) < 0.5 * error(None)


@pytest.mark.parametrize(("scheme", "method"), [("q4_1", "qa-lora"), ("nf4-double", "qlora")])
def test_checkpoints_keep_codes_and_adapters(scheme: str, method: str, tmp_path: Path) -> None:
    model, x = prepared(scheme)
    ig.add_adapters(model, rank=2, method=method)
    fine_tune(model, x)
    ig.save(model, tmp_path)
    again = ig.restore(float_model()[0], tmp_path).eval()
    assert_equal(again(x).detach(), model(x).detach())
    assert ig.adapter_report(again) == ig.adapter_report(model)


def test_what_does_not_go_together_is_refused() -> None:
    model, _ = prepared("w4a16")
    with pytest.raises(PlanError, match=r"Layer '0' takes no adapter by 'qa-lora'.*neither zero points nor offsets"):
        ig.add_adapters(model, rank=2, method="qa-lora")
    with pytest.raises(PlanError, match=r"Unknown method 'qlorra'\. Did you mean 'qlora'"):
        ig.add_adapters(model, rank=2, method="qlorra")
    with pytest.raises(PlanError, match="dora=True is for 'l4q'"):
        ig.add_adapters(model, rank=2, method="qlora", dora=True)
    with pytest.raises(PlanError, match="method='qlora'"):
        ig.add_adapters(model, rank=2, start="loftq")
    ig.add_adapters(model, rank=2, method="qlora")
    with pytest.raises(PlanError, match="by the method 'qlora'"):
        ig.add_adapters(model, rank=2, name="other")
    asymmetric, _ = prepared("q4_1")
    with pytest.raises(PlanError, match="its groups are a matrix of 64 by 8"):
        ig.add_adapters(asymmetric, rank=9, method="qa-lora")
    ig.freeze_codes(asymmetric)
    with pytest.raises(PlanError, match="kept as codes alone"):
        ig.add_adapters(asymmetric, rank=2)
