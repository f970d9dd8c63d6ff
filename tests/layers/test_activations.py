"""Elementwise functions as tables of codes: closed forms, ONNX Runtime and autograd say what they must be."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import erf, exp, expm1, log1p, sqrt, tanh
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.layers import activation_sites
from isogrid.layers.activations import ACTIVATIONS, Applied, applied, look_up, lookup_table
from isogrid.targets.onnx_activations import FLOAT_FORMS
from isogrid.targets.onnx_export import to_onnx
from isogrid.targets.onnx_runtime_session import STATIC_OPTIONS, open_session, optimized_graph
from tests.layers.runtime import Graph
from tests.models import assert_equal, prepared
from tests.planning.test_capture import Lambda

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
HALF, FIFTH = float(np.float32(0.5)), float(np.float32(0.2))

CLOSED_FORMS: dict[str, tuple[tuple[float, ...], Callable[[float], float]]] = {
    "abs": ((), abs),
    "celu": ((FIFTH,), lambda x: x if x > 0 else FIFTH * expm1(x / FIFTH)),
    "cos": ((), np.cos),
    "elu": ((FIFTH,), lambda x: x if x > 0 else FIFTH * expm1(x)),
    "erf": ((), erf),
    "exp": ((), exp),
    "gelu": ((), lambda x: x * (1 + erf(x / sqrt(2))) / 2),
    "gelu_tanh": ((), lambda x: x * (1 + tanh(sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2),
    "hardshrink": ((HALF,), lambda x: x if abs(x) > HALF else 0.0),
    "hardsigmoid": ((), lambda x: min(max(x + 3, 0), 6) / 6),
    "hardswish": ((), lambda x: x * min(max(x + 3, 0), 6) / 6),
    "leaky_relu": ((FIFTH,), lambda x: x if x > 0 else x * FIFTH),
    "logsigmoid": ((), lambda x: -log1p(exp(-x)) if x > 0 else x - log1p(exp(x))),
    "mish": ((), lambda x: x * tanh(log1p(exp(x)))),
    "neg": ((), lambda x: -x),
    "quick_gelu": ((), lambda x: x / (1 + exp(-1.702 * x))),
    "rrelu": ((FIFTH, HALF), lambda x: x if x > 0 else x * (FIFTH + HALF) / 2),
    "selu": ((), lambda x: SELU_SCALE * (x if x > 0 else SELU_ALPHA * expm1(x))),
    "sigmoid": ((), lambda x: 1 / (1 + exp(-x))),
    "silu": ((), lambda x: x / (1 + exp(-x))),
    "sin": ((), np.sin),
    "softplus": ((2.0, 20.0), lambda x: log1p(exp(2 * x)) / 2 if 2 * x < 20 else x),
    "softshrink": ((HALF,), lambda x: x - HALF if x > HALF else x + HALF if x < -HALF else 0.0),
    "softsign": ((), lambda x: x / (1 + abs(x))),
    "square": ((), lambda x: x * x),
    "tanh": ((), tanh),
    "tanhshrink": ((), lambda x: x - tanh(x)),
    "threshold": ((HALF, FIFTH), lambda x: x if x > HALF else FIFTH),
}
SLOPES = torch.tensor([0.25, -0.5, 1.5])


def grid(scale: float, zero_point: int, dtype: torch.dtype = torch.uint8) -> tuple[Tensor, Tensor]:
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=dtype)


def grid_for(y: Tensor) -> tuple[Tensor, Tensor]:
    low, high = min(0.0, float(y.min())), max(0.0, float(y.max()))
    scale = (high - low) / 255 or 1.0
    return grid(scale, round(-low / scale))


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_table_holds_the_codes_of_the_closed_form(name: str) -> None:
    parameters, function = CLOSED_FORMS[name]
    for scale, zero_point in ((0.031, 113), (0.0173, 0), (0.047, 255)):
        x = (np.arange(256) - zero_point).astype(np.float32) * np.float32(scale)
        y = np.array([function(float(value)) for value in x]).astype(np.float32)
        y_scale, y_zero_point = grid_for(torch.from_numpy(y))
        codes = np.clip(np.rint(y / y_scale.numpy()) + int(y_zero_point), 3, 251)
        table = lookup_table(Applied(name, parameters), *grid(scale, zero_point), y_scale, y_zero_point, 3, 251)
        assert_equal(table, torch.from_numpy(codes).to(torch.uint8))


def test_every_function_has_a_closed_form() -> None:
    assert ACTIVATIONS.keys() == CLOSED_FORMS.keys() | {"prelu"}


def test_signed_codes_and_slopes_by_channel() -> None:
    unsigned, signed = grid(0.03, 100), grid(0.03, -28, torch.int8)
    codes = torch.arange(256).to(torch.uint8).repeat(2, 3, 1)
    prelu = Applied("prelu", (), SLOPES)
    want = look_up(codes, lookup_table(prelu, *unsigned, *grid(0.02, 40), 0, 255))
    values = torch.where(codes > 100, 1.0, SLOPES[:, None]) * ((codes.float() - 100) * 0.03)
    assert_equal(want, torch.ops.isogrid.quantize(values, *grid(0.02, 40), 0, 255))
    shifted = (codes.to(torch.int16) - 128).to(torch.int8)
    found = look_up(shifted, lookup_table(prelu, *signed, *grid(0.02, -88, torch.int8), -128, 127))
    assert_equal(found.to(torch.int16) + 128, want.to(torch.int16))


class Site(nn.Module):
    """An integer site of one function."""

    def __init__(self, function: Applied, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], low: int = 2):
        super().__init__()
        self.function, self.low = function, low
        self.input_scale, self.input_zero_point = map(nn.Buffer, x)
        self.output_scale, self.output_zero_point = map(nn.Buffer, y)
        self.slopes = None if function.slopes is None else nn.Buffer(function.slopes)

    def forward(self, x: Tensor) -> Tensor:
        x_grid, y_grid = (self.input_scale, self.input_zero_point), (self.output_scale, self.output_zero_point)
        codes = torch.ops.isogrid.quantize(x, *x_grid, 0, 255)
        ending = (self.function.name, self.function.parameters, self.low, 255, "onnxruntime")
        found = torch.ops.isogrid.static_activation(codes, *x_grid, self.slopes, *y_grid, *ending)
        return torch.ops.isogrid.dequantize(found, *y_grid)


class Everything(nn.Module):
    """Every function, on one grid."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        functions = [Applied(name, parameters) for name, (parameters, _) in CLOSED_FORMS.items()]
        functions += [Applied("prelu", (), SLOPES[:1]), Applied("prelu", (), SLOPES)]
        self.sites = nn.ModuleList([Site(f, grid(0.037, 113), grid_for(f(x))) for f in functions])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [site(x) for site in self.sites]


def test_onnx_runtime_computes_every_function_on_every_code(tmp_path: Path) -> None:
    x = ((torch.arange(256) - 113) * 0.037).repeat(2, 3, 1)
    module = Everything(x).eval()
    path = tmp_path / "model.onnx"
    onnx.save(to_onnx(module, (x,)), path)
    session = open_session(path, STATIC_OPTIONS, threads=1)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for site, ours, theirs in zip(module.sites, module(x), found, strict=True):
        assert torch.equal(torch.from_numpy(theirs), ours), site.function
    kept = {node.op_type for node in optimized_graph(path, STATIC_OPTIONS).graph.node}
    assert {"GatherElements", "Gelu", "PRelu", "Sigmoid"} <= kept


OPERATORS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "abs": [("Abs", {})], "elu": [("Elu", {"alpha": FIFTH})], "exp": [("Exp", {})], "gelu": [("Gelu", {})],
    "gelu_tanh": [("Gelu", {"approximate": "tanh"})], "hardsigmoid": [("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5})],
    "hardswish": [("HardSwish", {})], "leaky_relu": [("LeakyRelu", {"alpha": FIFTH})], "neg": [("Neg", {})],
    "sigmoid": [("Sigmoid", {})], "silu": [("Sigmoid", {})], "tanh": [("Tanh", {})],
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_float_operators_stay_well_within_their_bound(name: str) -> None:
    bound, function = FLOAT_FORMS[name].error, CLOSED_FORMS[name][1]
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.linspace(-1e-3, 1e-3, 999)])
    graph = Graph()
    value = graph.input(x)
    for op, attributes in OPERATORS[name]:
        value = graph.node(op, [value], **attributes)
    if name == "silu":
        value = graph.node("Mul", [value, "input0"])
    found = graph.run(value, torch.float32)
    exact = torch.tensor([function(float(value)) for value in x], dtype=torch.float64)
    size = torch.maximum(x.double().abs(), exact.abs()).clamp(min=1.0)
    error = (found.double() - (exact if bound else exact.float().double())).abs() / size
    assert error.max() <= bound / 2


def test_a_value_at_a_tie_is_looked_up(tmp_path: Path) -> None:
    """sigmoid(0) = 0.5 lies between two codes of a grid with steps of 1/255."""
    nodes = []
    for scale in (1 / 255, 1 / 256):
        module = Site(Applied("sigmoid"), grid(0.1, 128), grid(scale, 0), low=0).eval()
        x = ((torch.arange(256) - 128) * 0.1).repeat(2, 1)
        onnx.save(to_onnx(module, (x,)), tmp_path / "model.onnx")
        session = open_session(tmp_path / "model.onnx", STATIC_OPTIONS, threads=1)
        assert_equal(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), module(x))
        graph = optimized_graph(tmp_path / "model.onnx", STATIC_OPTIONS).graph
        nodes.append({node.op_type for node in graph.node})
    assert "GatherElements" in nodes[0] and nodes[1] == {"QuantizeLinear", "QLinearSigmoid", "DequantizeLinear"}


@pytest.mark.parametrize("slope", [0.01, 0.2, 1 / 3])
def test_leaky_relu_of_onnx_runtime_is_the_table(slope: float) -> None:
    torch.manual_seed(0)
    codes = torch.arange(256).to(torch.uint8)
    for _ in range(20):
        x = grid(float(torch.rand(1)) + 1e-3, int(torch.randint(256, (1,))))
        y = grid(float(x[0]) * float(torch.rand(1) + 0.5), int(torch.randint(256, (1,))))
        function = applied(F.leaky_relu, (slope,), {})
        graph = Graph()
        value = graph.node("LeakyRelu", [graph.dequantized(graph.input(codes), *x)], alpha=slope)
        found = graph.run(graph.quantized(value, *y), torch.uint8, expect="QLinearLeakyRelu")
        assert_equal(found, lookup_table(function, *x, *y, 0, 255))


MODULES = [
    nn.CELU(0.5), nn.ELU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.Hardshrink(), nn.Hardsigmoid(inplace=True),
    nn.Hardswish(inplace=True), nn.LeakyReLU(0.2, True), nn.LogSigmoid(), nn.Mish(), nn.PReLU(), nn.PReLU(6),
    nn.RReLU(), nn.SELU(), nn.SiLU(), nn.Sigmoid(), nn.Softplus(), nn.Softshrink(), nn.Softsign(), nn.Tanh(),
    nn.Tanhshrink(), nn.Threshold(0.1, 0.2),
]  # fmt: skip


def test_training_evaluation_and_conversion_agree() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    pairs = [module for activation in MODULES for module in (nn.Linear(6, 6), activation)]
    model = prepared(nn.Sequential(*pairs, nn.Linear(6, 2)), (x,))
    y = model.eval()(x)
    assert_equal(ig.convert(model)(x), y.detach())
    for linear, activation in zip(model[0::2], model[1::2], strict=False):
        (site,) = cast(Any, activation).operations.sites.values()
        x = linear(x).detach()
        exact = deepcopy(activation).double()(x.double()).float()
        value = activation(x)
        assert_equal(value, site.output_quantizer(exact))
        if not isinstance(activation, nn.RReLU):
            assert_equal(activation.train()(x), value)
        x = value


def test_the_gradient_is_that_of_the_function() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    model = prepared(nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.SiLU(), nn.Linear(6, 2)), (x,))
    site: Any = model[2].operations.sites["silu"]
    inside = model[1](model[0](x)).detach().requires_grad_()
    twin = inside.detach().clone().requires_grad_()
    weights = torch.randn(64, 6)
    (model[2](inside) * weights).sum().backward()
    value = F.silu(twin)
    grid = site.output_quantizer
    assert ((value / grid.scale + grid.zero_point > 0) & (value / grid.scale + grid.zero_point < 255)).all()
    (value * weights).sum().backward()
    # The same factors, multiplied in another order.
    torch.testing.assert_close(inside.grad, twin.grad, rtol=1e-6, atol=1e-7)
    model(x).sum().backward()
    assert model[1].weight.grad.abs().min() > 0


@pytest.mark.parametrize("activation", [nn.GELU(), nn.PReLU(3)])
def test_tables_of_derivatives_give_the_gradients_of_all_values(
    activation: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 5)
    model = prepared(nn.Sequential(nn.Conv2d(3, 3, 1), activation, nn.Conv2d(3, 2, 1)), (x,)).train()
    found = []
    for compiling, piece in ((True, 1), (False, 2**16), (False, 100)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        monkeypatch.setattr(activation_sites, "PIECE", piece)
        inside = model[0](x).detach().requires_grad_()
        model.zero_grad()
        y = model[1](inside)
        (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).sum().backward()
        gradients = {name: p.grad for name, p in model[1].named_parameters()}
        found.append([y.detach(), inside.grad, *gradients.values()])
        assert all(gradient is not None for gradient in gradients.values())
    for other in found[1:]:
        assert_equal(other[0], found[0][0])
        for ours, all_values in zip(other[1:], found[0][1:], strict=True):
            # Sums and products in another order.
            torch.testing.assert_close(ours, all_values, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same_where_activations_are_made_again() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 5)
    model = prepared(nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.GELU(), nn.Linear(6, 2)), (x,)).train()
    found = []
    for run in (model, partial(checkpoint, model, use_reentrant=False)):
        model.zero_grad()
        run(x).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert len(found[0]) > 8
    for plain, again in zip(*found, strict=True):
        assert_equal(again, plain)


def test_random_slopes_are_drawn_in_training_and_rounded() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    model = prepared(nn.Sequential(nn.Linear(5, 6), nn.RReLU(0.1, 0.9), nn.Linear(6, 2)), (x,))
    site: Any = model[1].operations.sites["rrelu"]
    inside = model[0](x)
    drawn = [model.train()[1](inside) for _ in range(2)]
    assert not torch.equal(*drawn)
    for y in drawn:
        assert_equal(y, site.output_quantizer(y))


def test_what_is_not_a_number_stays_visible() -> None:
    x = torch.randn(8, 5)
    model = prepared(nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 2)), (x,))
    broken = x.clone()
    broken[3, 1] = torch.nan
    for y in (model.train()(broken), model.eval()(broken)):
        assert_equal(y.isnan().any(1), torch.arange(8) == 3)


def test_a_table_needs_integers_on_both_sides() -> None:
    def reasons(model: nn.Module) -> tuple[dict[str, str], list[str]]:
        plan = ig.plan(model, example_inputs=(torch.randn(3, 4),))
        return dict(plan.floats), [operation.site for operation in plan.operations]

    between = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.GELU(), nn.Linear(4, 4))
    assert reasons(between) == ({}, ["tanh", "gelu"])
    behind = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.GELU())
    float_, sites = reasons(behind)
    assert list(float_) == ["1.tanh", "2.gelu"] and not sites and "would only round" in float_["1.tanh"]
    before = nn.Sequential(nn.Tanh(), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 4))
    assert list(reasons(before)[0]) == ["0.tanh", "1", "2.silu"]
    # Behind a sum that nothing else reads, and twice by one name.
    shared = nn.GELU()
    twice = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared, nn.Linear(4, 4))
    assert reasons(twice)[1] == ["gelu"]
    half = nn.Sequential(nn.Linear(4, 4), shared, nn.LayerNorm(4), shared, nn.Linear(4, 4))
    assert reasons(half)[1] == []


def test_calls_by_all_their_names_and_in_place() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        y = module.a(x)
        z = y
        y.sigmoid_()
        y = torch.tanh(input=module.b(z) + x)
        y = -module.b(y)
        return module.a(F.leaky_relu(F.elu(module.b(y), 0.5, True), 0.1, True).exp())

    torch.manual_seed(0)
    x = torch.randn(9, 4)
    model = prepared(Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), (x,))
    assert {"sigmoid", "tanh", "neg", "elu", "leaky_relu", "exp"} <= model.operations.sites.keys()
    assert_equal(ig.convert(model)(x), model.eval()(x).detach())
    model.train()(x).sum().backward()


def test_a_parameter_that_is_no_number_keeps_a_function_float() -> None:
    with pytest.raises(PlanError, match="elu whose alpha is a Tensor"):
        applied(F.elu, (torch.ones(1),), {})
    model = Lambda(lambda m, x: m.b(F.threshold(m.a(x), x.shape[0], 0)), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    assert [o.site for o in ig.plan(model, example_inputs=(torch.randn(2, 3),)).operations] == ["threshold"]


@pytest.mark.parametrize("name", ["NewGELU", "QuickGELU", "GELU", "ReLUSquared"])
def test_activations_of_transformers_are_one_table(name: str) -> None:
    activation = getattr(pytest.importorskip("transformers.activations"), f"{name}Activation")
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    model = nn.Sequential(nn.Linear(5, 6), activation(), nn.Linear(6, 2))
    twin, plan = deepcopy(model), ig.plan(model, example_inputs=(x,))
    assert plan.floats == () and len(plan.operations) == 1
    ig.prepare(model, plan)
    ig.calibrate(model, [x])
    assert_equal(ig.convert(model)(x), model.eval()(x).detach())
    assert (model(x) - twin(x)).abs().max() < 0.1


def test_a_norm_is_float_between_quantised_edges() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        x = module.b(F.layer_norm(module.norm(module.a(x)), (6,)))
        return module.c(F.group_norm(module.group(x), 2))

    children = {"a": nn.Linear(5, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 2)}
    model = Lambda(forward, norm=nn.RMSNorm(6), group=nn.GroupNorm(2, 6), **children)
    plan = ig.plan(model, example_inputs=(torch.randn(7, 5),))
    assert [name for name, _ in plan.floats] == ["norm", "layer_norm", "group", "group_norm"]
    assert all("computes its statistics in float" in reason for _, reason in plan.floats)
    inputs = [site.name for site in plan.sites if site.kind == "input"]
    assert inputs == ["a.input", "b.input", "c.input"]
    assert all(layer.output is None for layer in plan.layers)


def test_a_table_of_what_a_join_has_quantised() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (6,))
        return module.head(torch.cat([y, -y], -1).cos())

    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    model = prepared(Lambda(forward, head=nn.Linear(12, 2)), (x,)).eval()
    assert_equal(ig.convert(model)(x), model(x).detach())
