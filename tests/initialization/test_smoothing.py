"""SmoothQuant: its factors, what takes them in, and what stays as it is."""

from typing import Any

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import CaptureError, NonFiniteError, NotCalibratedError, PlanError
from tests.initialization.networks import batch, network


def test_factors_are_the_published_ones() -> None:
    model, x = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), torch.randn(16, 4)
    norm, linear = model
    inputs, weight = norm(x).abs().amax(0), linear.weight.detach().clone()
    ig.smooth(model, [x], example_inputs=(x,), alpha=0.7)
    factors = inputs**0.7 / weight.abs().amax(0) ** 0.3
    torch.testing.assert_close(linear.weight, weight * factors)
    torch.testing.assert_close(norm.weight, 1 / factors)


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_the_model_computes_what_it_did(norm: Any) -> None:
    model, x = network(norm), batch()
    before = model(x)
    found = ig.smooth(model, [x], example_inputs=(x,))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert [(maker, readers) for _, maker, readers in found.changed] == [
        ("1.norm", "1.gate, 1.up"),
        ("1.up", "1.down"),
        ("2.norm", "2.gate, 2.up"),
        ("2.up", "2.down"),
        ("3", "4"),
    ]
    assert found.kept == (("0", "its input comes from outside the model"),)


def test_it_quantises_better() -> None:
    def error(model: nn.Module) -> float:
        before = model(batch())
        plan = ig.plan(model, scheme="w8a8", example_inputs=(batch(),))
        ig.calibrate(ig.prepare(model, plan), [batch()])
        return float((model.eval()(batch()) - before).detach().square().mean())

    smoothed = network()
    ig.smooth(smoothed, [batch()], example_inputs=(batch(),))
    assert error(smoothed) < error(network())


def test_a_relu_lets_factors_through_and_a_sum_does_not() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.b(self.a(x).relu())
            return self.c(x + y)

    x = torch.randn(4, 8)
    found = ig.smooth(Network(), [x], example_inputs=(x,))
    assert found.changed == (("smoothed", "a", "b"),)
    assert ("c", "its input comes from add, which no factor passes through") in found.kept


def test_layers_that_are_read_elsewhere_or_tied_stay() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[3].weight = model[1].weight
    x = torch.randn(4, 8)
    with torch.no_grad():
        before = model[1].weight.clone()
    found = ig.smooth(model, [x], example_inputs=(x,))
    assert found.changed == () and len(found.kept) == 2
    assert torch.equal(model[1].weight, before)


def test_bad_input_leaves_the_model_as_it_was() -> None:
    model, x = network(), batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match="alpha is 2"):
        ig.smooth(model, [x], example_inputs=(x,), alpha=2)
    with pytest.raises(PlanError, match="is the name of no linear layer"):
        ig.smooth(model, [x], example_inputs=(x,), match="fc*")
    with pytest.raises(NotCalibratedError, match="no batch"):
        ig.smooth(model, [], example_inputs=(x,))
    with pytest.raises(NotCalibratedError, match="Batch 1 is empty"):
        ig.smooth(model, [x, x[:0]], example_inputs=(x,))
    with pytest.raises(NonFiniteError, match=r"flows into 1\.gate"):
        ig.smooth(model, [x.masked_fill(x > 1, torch.nan)], example_inputs=(x,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ig.prepare(model, ig.plan(model, scheme="w8a8", example_inputs=(x,)))
    with pytest.raises(PlanError, match="prepared already"):
        ig.smooth(model, [x], example_inputs=(x,))


def test_what_does_not_cancel_out_is_undone() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(self.norm(x))
            with torch._C.DisableTorchFunction():
                return y * self.norm.weight

    model, x = Network(), torch.randn(4, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CaptureError, match="as it was"):
        ig.smooth(model, [x], example_inputs=(x,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
