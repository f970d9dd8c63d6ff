"""Operations of a forward, against exact arithmetic on their codes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isogrid as ig
from isogrid.layers.clamp import RELU
from tests.models import assert_equal, prepared
from tests.planning.test_capture import Lambda


def flow(function: Any, *inputs: torch.Tensor, **children: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """A prepared model of one function, and its output, which its integer twin computes too."""
    model = prepared(Lambda(function, **children), inputs)
    evaluated = model.eval()(*inputs)
    assert_equal(ig.convert(model)(*inputs), evaluated.detach())
    assert_equal(model.train()(*inputs), evaluated)
    return model, evaluated


@pytest.mark.parametrize("function", [
    lambda m, a, b: a + b, lambda m, a, b: a - b, lambda m, a, b: torch.add(a, b, alpha=-0.7), lambda m, a, b: a * b,
    lambda m, a, b: a + 0.3, lambda m, a, b: 0.3 - a, lambda m, a, b: a / -3, lambda m, a, b: 2 * a,
    lambda m, a, b: a.sub_(b), lambda m, a, b: torch.rsub(a, b),
])  # fmt: skip
def test_a_result_is_rounded_once(function: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 8)
    model, _ = flow(
        lambda m, x: m.head(function(m, m.a(x), m.b(x))), x, a=nn.Linear(8, 8), b=nn.Linear(8, 8), head=nn.Linear(8, 2)
    )
    (site,) = model.operations.sites.values()
    exact = function(None, model.a(x).double(), model.b(x).double())
    (y,) = {layer.input_quantizer: layer.input_quantizer for layer in [model.head]}.values()
    assert y is site.output_quantizer
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(x)
    half = float(y.scale.detach()) / 2
    assert (seen[0] - exact.clamp(seen[0].min(), seen[0].max())).abs().max() <= half * 1.0001


@pytest.mark.parametrize(("a", "b"), [
    ((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (3, 4)), ((2, 3, 4), (3, 1)), ((2, 1, 4), (1, 3, 4)), ((2, 1), (1, 5)),
])  # fmt: skip
def test_sums_and_products_that_broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    size = torch.broadcast_shapes(a, b)[-1]
    layers = {"a": nn.Linear(a[-1], a[-1]), "b": nn.Linear(b[-1], b[-1]), "head": nn.Linear(size, 2)}
    model, y = flow(lambda m, a, b: m.head((m.a(a) + m.b(b)) * m.b(b)), torch.randn(a), torch.randn(b), **layers)
    assert y.shape[:-1] == torch.broadcast_shapes(a, b)[:-1] and len(model.operations.sites) == 2


def test_a_parameter_may_be_added() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.bias

    model = prepared(nn.Sequential(Bias(), nn.Linear(4, 2)), (torch.randn(3, 4),))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    assert model[0].bias.grad.abs().sum() > 0
    assert_equal(ig.convert(model)(x), model.eval()(x).detach())


def test_a_write_in_place_is_seen_under_every_name() -> None:
    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        y = module.fc(x)
        other = y
        y += x
        return other * 1.0

    model, _ = flow(forward, torch.randn(5, 3), fc=nn.Linear(3, 3))
    plain = model.fc(x := torch.randn(5, 3)) + x
    assert (model(x) - plain).abs().max() < 0.2
    model(x).sum().backward()


def test_a_relu_behind_a_sum_costs_nothing() -> None:
    model, _ = flow(
        lambda m, a, b: m.head(F.relu(m.fc(a) + b)), torch.randn(9, 4), torch.randn(9, 4),
        fc=nn.Linear(4, 4), head=nn.Linear(4, 4),
    )  # fmt: skip
    site: Any = model.operations.sites["add"]
    assert site.clamp == RELU and site.output_quantizer.zero_point == 0
    assert (site(torch.add, model.fc(torch.randn(9, 4)), torch.randn(9, 4)) >= 0).all()


def test_parts_of_a_concatenation_pass_unrounded() -> None:
    model, _ = flow(
        lambda m, x: m.head(torch.cat([m.a(x), m.b(x)], 1)), torch.randn(9, 4),
        a=nn.Linear(4, 3), b=nn.Linear(4, 2), head=nn.Linear(5, 2),
    )  # fmt: skip
    a, b, site = model.a, model.b, model.operations.sites["concat"]
    assert a.output_quantizer is b.output_quantizer is site.output_quantizer
    x = torch.randn(9, 4)
    assert_equal(site(torch.cat, [a(x), b(x)], 1), torch.cat([a(x), b(x)], 1))


@pytest.mark.parametrize("function", [
    lambda m, x: F.avg_pool2d(x, 2), lambda m, x: F.adaptive_avg_pool2d(x, 1),
    lambda m, x: F.avg_pool2d(x, 3, 2, 1), lambda m, x: F.adaptive_avg_pool2d(x, (3, 2)),
])  # fmt: skip
def test_pooling_is_within_one_rounding_of_the_mean(function: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model, y = flow(function, x)
    site: Any = next(iter(model.operations.sites.values()))
    exact = function(None, site.input_quantizer0(x).double())
    assert (y - exact.clamp(y.min(), y.max())).abs().max() <= float(site.output_quantizer.scale.detach()) * 0.5001


def test_a_mean_over_space_is_pooling_where_integers_make_and_read_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model, y = flow(lambda m, x: m.b(m.a(x).mean((2, 3))), x, a=nn.Conv2d(3, 4, 1), b=nn.Linear(4, 2))
    site: Any = model.operations.sites["mean"]
    pooled = site(F.adaptive_avg_pool2d, model.a(x), 1).flatten(1)
    assert_equal(model.b(pooled).detach(), y.detach())


def test_the_variance_of_a_norm_that_is_spelt_out_stays_float() -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)

    model = Lambda(lambda m, x: m.b(norm(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    plan = ig.plan(model, example_inputs=(torch.randn(2, 5, 4),))
    assert plan.operations == ()
    assert {"mul", "mean", "add", "rsqrt", "mul_1"} == dict(plan.floats).keys()


def test_a_site_shows_its_formats() -> None:
    model, _ = flow(lambda m, a, b: m.fc(m.fc(a) + b), torch.randn(3, 4), torch.randn(3, 4), fc=nn.Linear(4, 4))
    assert "inputs=uint8/tensor, uint8/tensor, output=uint8/tensor" in str(model)
