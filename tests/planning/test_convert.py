from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import NonFiniteError, NotCalibratedError
from isogrid.planning.convert import watched
from tests.models import assert_equal, make, prepared, train


def test_before_calibration_the_site_is_named() -> None:
    model, inputs = make("small")
    with pytest.raises(NotCalibratedError, match=r"conv.input_quantizer has no range. Run isogrid.calibrate"):
        ig.convert(prepared(model, inputs, calibrate=False))


def test_weights_that_are_no_numbers_are_named() -> None:
    model, inputs = make("small")
    prepared(model, inputs)
    with torch.no_grad():
        model.norm.bias[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"norm.bias holds NaN or infinity"):
        ig.convert(model)


def test_the_prepared_model_stays_as_it_is() -> None:
    model, inputs = make("residual")
    prepared(model, inputs).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = ig.convert(model)
    assert model.training and not converted.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    assert not any("quantizer" in name for name in converted.state_dict())


def test_sums_beyond_what_float32_holds_are_exact() -> None:
    torch.manual_seed(0)
    size = 2**12
    model = nn.Sequential(nn.Linear(size, 4), nn.Linear(4, 2))
    inputs = (torch.rand(3, size),)
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(4, size) * 0.9 + 0.1)
    prepared(model, inputs, rules=[ig.Rule(match="0", range="absmax")])
    converted: Any = ig.convert(model)
    layer = converted[0]
    codes = layer.quantized("input", *inputs).to(torch.int64)
    products = (codes - layer.input_zero_point.to(torch.int64)) @ layer.codes.to(torch.int64).T
    assert products.abs().max() > 2**24
    step = layer.input_scale * layer.weight_scale / layer.output_scale
    expected = torch.round((products + layer.bias).to(torch.float32) * step) + layer.output_zero_point
    seen: dict[str, Tensor] = {}
    with watched(converted, lambda name, codes: seen.setdefault(name, codes)):
        output = converted(*inputs)
    assert_equal(seen["0.output"].to(torch.float32), expected.clamp(0, 255))
    # Training computes the same integers, for its forward is the runtime's.
    assert_equal(model.train()(*inputs).detach(), output)


def test_shared_modules_stay_shared() -> None:
    model, inputs = make("shared")
    converted = ig.convert(prepared(model, inputs))
    assert sum(type(m).__name__ == "IntegerLinear" for m in converted.modules()) == 2


def test_watching_shows_codes_and_may_change_them() -> None:
    model, inputs = make("residual")
    converted = ig.convert(prepared(model, inputs))
    seen: dict[str, Tensor] = {}

    def note(name: str, codes: Tensor) -> Tensor:
        seen[name] = codes
        return codes

    with watched(converted, note):
        plain = converted(*inputs)
    assert {"stem.0.input", "stem.0.output", "operations.sites.add.output", "fc.input"} <= set(seen)
    assert all(codes.dtype == torch.uint8 for codes in seen.values())
    with watched(converted, lambda name, codes: codes ^ 1 if name == "fc.input" else codes):
        assert not torch.equal(converted(*inputs), plain)
    assert_equal(converted(*inputs), plain)


@pytest.mark.parametrize("scheme", ["w4a16", "w2a16", "w8a8-dynamic"])
def test_few_bit_layers(scheme: str) -> None:
    model, inputs = make("tied")
    train(prepared(model, inputs, scheme), inputs, steps=2)
    assert_equal(ig.convert(model)(*inputs), model.eval()(*inputs).detach())


def test_weights_whose_scale_follows_them() -> None:
    model, inputs = make("residual")
    train(prepared(model, inputs, rules=[ig.Rule(match="*", scale="moving", range="absmax")]), inputs, steps=3)
    assert_equal(ig.convert(model)(*inputs), model.eval()(*inputs).detach())
