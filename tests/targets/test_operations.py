"""Operations of a forward in ONNX Runtime: the kernels that were trained for, and their very codes."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import CaptureError
from tests.models import assert_equal, prepared
from tests.planning.test_capture import Lambda
from tests.targets.proving import all_integer, proven, stored


def linears(count: int, size: int = 6) -> dict[str, nn.Module]:
    return {f"l{number}": nn.Linear(size, size) for number in range(count)}


def test_sums_and_products(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.l0(x), m.l1(x)
        y = (a - b) * m.l2(x)
        y = 1 - F.relu6(y)
        y = y / 3 + a * m.gamma
        y = torch.add(y, b, alpha=-0.5)
        y += m.position
        y -= 0.7
        return m.l4(y * torch.relu(m.l3(y[:, :1])))

    model = Lambda(forward, **linears(5))
    model.gamma, model.position = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, 7, 6))
    operators = all_integer(model, (torch.randn(3, 7, 6),), tmp_path)
    assert operators["QLinearAdd"] == 6 and operators["QLinearMul"] == 4
    file = stored(tmp_path / "model.onnx")
    assert {name for name, x in file.items() if x.dtype == torch.uint8 and x.numel() > 1} == {
        "operations.sites.mul_1.input1", "operations.sites.add_2.input1",
    }  # fmt: skip
    assert not {"gamma", "position"} & set(file)


def test_one_result_on_several_grids(tmp_path: Path) -> None:
    """ONNX Runtime merges operations that differ only in how their results are rounded, and has no kernel for that."""
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.l0(x), m.l1(x)
        y = m.l2(a + b) + m.l3(a + b) + m.l4(a + b)
        return m.l5(y + m.l6(a * b) * (a * b) + m.l7(a @ b.mT) @ (a @ b.mT))

    model = prepared(Lambda(forward, **linears(8)), inputs := (torch.randn(3, 6, 6),))
    sites: Any = model.operations.sites
    for number, site in enumerate(("add_1", "add_3", "mul_1", "matmul_1")):
        with torch.no_grad():
            sites[site].output_quantizer.raw_scale *= 1.1 + number / 10
    artifact = ig.export(model.eval(), tmp_path / "model.onnx")
    report = ig.verify(model, artifact, [inputs])
    assert report, str(report)
    assert report.exact and report.differing_codes == 0


def test_squeeze_and_excite(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = F.hardsigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
        return m.head((x * gate).mean((2, 3)))

    model = Lambda(
        forward, stem=nn.Conv2d(3, 8, 3), down=nn.Conv2d(8, 2, 1), up=nn.Conv2d(2, 8, 1), head=nn.Linear(8, 2)
    )
    operators = all_integer(model, (torch.randn(3, 3, 8, 8),), tmp_path)
    assert operators["QLinearMul"] == 1 and operators["QLinearConv"] == 3


def test_attention_by_hand(tmp_path: Path) -> None:
    """The product before the softmax is float at its end, for nothing integer reads it; its MACs are integers."""
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (m.l0, m.l1, m.l2))
        weights = (q @ k.transpose(-1, -2) / 3**0.5 + mask[:, None, None]).softmax(-1)
        y = torch.matmul(weights, v).transpose(1, 2).flatten(2)
        return m.l3(torch.bmm(m.l4(x), y.transpose(1, 2)) @ y)

    model = Lambda(forward, **linears(5))
    mask = torch.zeros(2, 7)
    mask[:, 5:] = -torch.inf
    trained, operators = proven(model, (torch.randn(2, 7, 6), mask), tmp_path)
    assert operators["QLinearMatMul"] == 3 and operators["MatMulIntegerToFloat"] == 1 and not operators["MatMul"]
    assert [(o.kind, o.site, o.output is None) for o in trained.isogrid.plan.operations] == [
        ("matmul", "matmul", True),
        ("matmul", "matmul_1", False),
        ("matmul", "bmm", False),
        ("matmul", "matmul_2", False),
    ]


def test_scaled_dot_product_attention(tmp_path: Path) -> None:
    """Masks of booleans and of floats, causal, grouped: the products of all run in integers."""
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (m.l0, m.l1, m.l2))
        y = F.scaled_dot_product_attention(q, k, v, keep)
        y = F.scaled_dot_product_attention(y, k[:, :1], v[:, :1], is_causal=True, scale=0.7, enable_gqa=True)
        y = F.scaled_dot_product_attention(y, k, v, torch.where(keep, 0.0, -1e4), dropout_p=0.1 if m.training else 0.0)
        return m.l3(y.transpose(1, 2).flatten(2))

    keep = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    keep[..., 5:] = False
    trained, operators = proven(Lambda(forward, **linears(4)), (torch.randn(2, 7, 6), keep), tmp_path)
    assert operators["QLinearMatMul"] + operators["MatMulIntegerToFloat"] == 6 and not operators["MatMul"]
    names = [operation.site for operation in trained.isogrid.plan.operations]
    assert names[:3] == [
        "scaled_dot_product_attention_matmul",
        "scaled_dot_product_attention_matmul_1",
        "scaled_dot_product_attention_1_matmul",
    ]


def test_einsum_stack_and_glu(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.l0(x), m.l1(x)
        y = torch.einsum("btc,bsc->bts", a, b)
        y = torch.einsum("bts,bsc->btc", y, m.l2(x))
        y = F.glu(torch.cat([y, a], -1))
        return m.l3(torch.stack([y, b], 1))

    operators = all_integer(Lambda(forward, **linears(4)), (torch.randn(2, 5, 6),), tmp_path)
    assert operators["QLinearMatMul"] == 2 and operators["QLinearMul"] == 1


def test_values_that_only_move_stay_on_their_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = F.pixel_shuffle(F.interpolate(F.pad(x, (1, 0, 2, 1)), scale_factor=2), 2)
        x = F.pad(torch.roll(x, (1, 2), (2, 3)), (1, 1, 1, 1), mode="reflect")
        a, b = x.flatten(2).mT.contiguous().chunk(2, 1)
        a = a.masked_fill(torch.arange(a.shape[1])[:, None] < 3, 0)
        return m.head(torch.cat([a.amax(1), b.index_select(1, torch.tensor([2, 0])).repeat(1, 2, 1)[:, 3]], -1))

    model = Lambda(forward, stem=nn.Conv2d(3, 8, 3), head=nn.Linear(4, 2))
    plan = ig.plan(model, example_inputs=(torch.randn(2, 3, 6, 6),))
    assert [site.name for site in plan.sites if site.kind != "weight"] == ["stem.output", "stem.input"]
    all_integer(model, (torch.randn(2, 3, 6, 6),), tmp_path)


class Head(nn.Module):
    """A detection head that calls functions with its own parameters, the same on every level."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.tower, self.tower_bias = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4))
        self.classes = nn.Parameter(torch.randn(2, 4, 1, 1))
        self.last = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        x, found = self.stem(x), []
        for level in (x, F.max_pool2d(x, 2)):
            features = F.relu(F.conv2d(level, self.tower, self.tower_bias, padding=1))
            found.append(F.conv2d(features, self.classes).flatten(2))
        return F.linear(torch.cat(found, 2).mT, weight=self.last) + F.linear(x[:, :2, 0, 0], self.last * 2)[:, None]


def test_the_nearest_is_taken_of_codes(tmp_path: Path) -> None:
    """Bilinear interpolation beside it stays float, and has its row though both are called interpolate."""
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        wide = F.interpolate(m.a(x), scale_factor=2), F.interpolate(m.b(x), size=(12, 12), mode="bilinear")
        return m.head(torch.cat(wide, 1))

    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 1), "head": nn.Conv2d(8, 2, 1)}
    trained, operators = proven(Lambda(forward, **layers), (torch.randn(2, 3, 6, 6),), tmp_path)
    assert [name for name, _ in trained.isogrid.plan.floats] == ["interpolate"]
    assert operators["Resize"] == 2 and operators["Min"] == 1 and operators["QuantizeLinear"] == 2


def test_a_choice_takes_codes_of_either_side(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.l0(x), m.l1(x)
        y = torch.where(x > 0, a, b)
        return m.l5(m.l3(torch.where(x > 1, m.l2(y), 0.0)) + m.l4(torch.where(x > 0, 0, other=y)))

    model = Lambda(forward, **linears(6))
    operators = all_integer(model, (torch.randn(3, 7, 6),), tmp_path)
    # One QuantizeLinear: that of the input.
    assert (operators["QGemm"], operators["QLinearWhere"], operators["QuantizeLinear"]) == (6, 3, 1), operators


def test_choices_that_are_no_codes_stay_float(tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.where(x > 0, m.l0(x), 1.0)
        y = torch.where(x > 0, m.l1(y), torch.full_like(x, -torch.inf)).clamp(min=-1.0)
        return m.l2(torch.where(x > 0, y.sin(), y.cos()))

    plan = ig.plan(Lambda(forward, **linears(3)), scheme="w8a8", example_inputs=(torch.randn(3, 6),))
    assert {name: reason for name, reason in plan.floats if "where" in name} == {
        "where": "where with 1.0, which need not lie on the grid of the rest",
        "where_1": "where with a mask, whose values no grid can hold beside others",
        "where_2": "where with no quantised neighbour to join",
    }


def test_functions_of_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Head(), torch.randn(2, 3, 8, 8)
    before = list(model.state_dict())
    plan = ig.plan(model, example_inputs=(x,))
    assert list(model.state_dict()) == before and not hasattr(model, "tower_conv2d")
    assert [layer.path for layer in plan.layers] == ["stem", "tower_conv2d", "classes_conv2d", "last_linear"]
    assert plan.layers[1].clamp is not None and ig.Plan.from_json(plan.to_json()) == plan
    assert "linear" in dict(plan.floats)  # by a weight that is computed
    trained, operators = proven(model, (x,), tmp_path)
    assert operators["QLinearConv"] == 5 and set(before) < set(trained.state_dict())
    assert trained.tower.grad is not None and trained.tower.grad.abs().sum() > 0


def test_the_gradient_of_a_product_is_that_of_its_rounded_operands() -> None:
    torch.manual_seed(0)
    model = Lambda(lambda m, x: m.l0(x) @ m.l1(x).mT, **linears(2))

    x = torch.randn(2, 4, 6)
    prepared(model, (x,))
    model(x).square().sum().backward()
    a, b = model.l0(x).detach().requires_grad_(), model.l1(x).detach().requires_grad_()
    y = a @ b.mT
    torch.testing.assert_close(model(x), y)
    y.square().sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(model.l0.bias.grad, a.grad.sum((0, 1)))


def test_zeros_that_are_padded_before_a_maximum_count(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(2, 4, 3), "b": nn.Conv2d(4, 2, 1)}
    nn.init.constant_(parts["a"].bias, -2.0)
    model = Lambda(lambda m, x: m.b(F.max_pool2d(F.pad(m.a(x), (1, 1, 1, 1)), 3, 2)), **parts)
    operators = all_integer(model, (torch.randn(2, 2, 9, 9),), tmp_path)
    assert operators["Pad"] == 1 and operators["QLinearConv"] == 2


class DenseBlock(nn.ModuleDict):
    """As torchvision's: its children are its layers, and its forward joins what they make."""

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.values():
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + super().forward(x))


def test_operations_in_the_forward_of_a_container(tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = DenseBlock({"first": nn.Conv2d(4, 4, 3, padding=1), "second": nn.Conv2d(8, 4, 3, padding=1)})
    residual = Residual(nn.Conv2d(12, 12, 1), nn.ReLU(), Residual(nn.Conv2d(12, 12, 1)))
    model = Lambda(
        lambda m, x: m.head(torch.add(y := m.features(m.stem(x)), y).mean((2, 3))),
        stem=nn.Conv2d(3, 4, 3), features=nn.Sequential(block, residual), head=nn.Linear(12, 2),
    )  # fmt: skip
    operators = all_integer(model, (torch.randn(3, 3, 8, 8),), tmp_path)
    assert operators["QLinearAdd"] == 3 and operators["QLinearConv"] == 5
    assert (list(block), len(residual)) == (["first", "second"], 3)
    for ready in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model.features))):
        x = torch.randn(3, 4, 6, 6)
        features = getattr(ready, "features", ready)
        assert_equal(features(x), model.features(x))
    assert {name for name, _ in model.named_modules()} >= {
        "operations.sites.add", "operations.sites.features.0.concat_1", "operations.sites.features.1.add",
        "operations.sites.features.1.2.add",
    }  # fmt: skip


def test_a_model_that_is_a_container_keeps_its_operations_float() -> None:
    plan = ig.plan(Residual(nn.Conv2d(4, 4, 1)), scheme="w8a8", example_inputs=(torch.randn(3, 4, 8, 8),))
    assert dict(plan.floats)["add"] == "in the forward of a Residual, whose children are its layers, and the model"


def test_a_container_that_is_called_like_a_site_is_refused() -> None:
    x = torch.randn(3, 4, 8, 8)
    model = Lambda(
        lambda m, x: m.head(m.add(x) + m.other(x)), add=Residual(nn.Conv2d(4, 4, 1)), other=nn.Conv2d(4, 4, 1)
    )
    model.head = nn.Conv2d(4, 4, 1)
    before = set(model.state_dict())
    with pytest.raises(CaptureError, match="'add' of a Lambda is called like"):
        ig.prepare(model, ig.plan(model, scheme="w8a8", example_inputs=(x,)))
    assert set(model.state_dict()) == before
