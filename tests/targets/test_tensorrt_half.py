"""What stays float for TensorRT trains and computes in float16, and is float16 in the file."""

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.report.building import layers
from isogrid.report.figures import layer_figure
from isogrid.targets.onnx_reading import OnnxGraph, nodes_of
from isogrid.targets.tensorrt_rules import lint
from isogrid.verification.replay import HALF_BOUND


class Detector(nn.Module):
    """Images to boxes and edges by convolutions, which read quantised values, to scores of tokens by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.boxes = nn.Conv2d(16, 4, 3, padding=1, groups=2)
        self.edges = nn.Conv2d(16, 2, 3, padding="same", padding_mode="reflect", bias=False)
        self.scores = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.stem(x))
        y = F.relu(self.block(x))
        return self.boxes(x), self.edges(x), self.scores(y.flatten(2).transpose(1, 2))


def detector() -> tuple[nn.Module, Tensor]:
    """Trained for two steps, and images."""
    torch.manual_seed(0)
    model, x = Detector(), torch.randn(3, 3, 6, 6)
    ig.prepare(model, ig.plan(model, target="tensorrt", scheme="w8a8", example_inputs=(x,)))
    ig.calibrate(model, [x])
    optimizer = torch.optim.SGD(ig.parameter_groups(model, lr=1e-2))
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack([y.square().mean() for y in model(x)]).sum().backward()
        optimizer.step()
    return model.eval(), x


HEADS = ("boxes", "edges", "scores")


def test_heads_are_float16_from_training_to_the_file(tmp_path: Path) -> None:
    model, x = detector()
    integer = ig.convert(model)
    with torch.no_grad():
        for trained, converted in zip(model(x), integer(x), strict=True):
            assert torch.equal(trained, converted)
            assert torch.equal(trained, trained.half().float())
    artifact = ig.export(model, tmp_path / "model.onnx")
    proto = onnx.load(artifact.path)
    assert [finding for finding in lint(proto) if finding.severity != "note"] == []
    assert all(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in proto.graph.output)
    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in proto.graph.initializer}
    for head in HEADS:
        layer = model.get_submodule(head)
        for name, parameter in layer.named_parameters(recurse=False):
            assert stored[f"{head}.{name}"].dtype == torch.float16
            assert torch.equal(stored[f"{head}.{name}"], parameter.detach().half())
    graph = OnnxGraph(proto)
    types = {node.name: graph.type(node.input[0]) for node in nodes_of(graph, "Conv", "Gemm", "MatMul")}
    assert {name for name, found in types.items() if found == TensorProto.FLOAT16} == set(HEADS)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "fp8"])
def test_onnx_runtime_agrees(tmp_path: Path, caplog: pytest.LogCaptureFixture, scheme: str) -> None:
    if scheme == "w8a8":
        model, x = detector()
    else:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(8, 8, 5), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 12))
        x, rules = torch.randn(2, 8, 132), [ig.Rule(match="3", weight="float16")]
        ig.prepare(model, ig.plan(model, target="tensorrt", scheme=scheme, rules=rules, example_inputs=(x,)))
        ig.calibrate(model, [x])
    artifact = ig.export(model, tmp_path / "model.onnx")
    report = ig.verify(model, artifact, [x])
    assert report, str(report)
    assert not [record for record in caplog.records if record.name.startswith("isogrid")]  # of unplanned calls, say
    halves = {layer.path for layer in artifact.plan.layers if layer.arithmetic == "half"}
    assert halves == {*HEADS} if scheme == "w8a8" else {"0", "3"}
    replays = {check.name: check for check in report.replays}
    for name in halves:
        assert replays[f"{name}.output"].bound == pytest.approx(HALF_BOUND)
        assert replays[f"{name}.output"].max_difference <= HALF_BOUND


def test_a_weight_that_is_another_is_found(tmp_path: Path) -> None:
    model, x = detector()
    path = ig.export(model, tmp_path / "model.onnx").path
    with torch.no_grad():
        model.get_submodule("scores").weight[0, 0] *= 1.002
    report = ig.verify(model, path, [x])
    assert not report
    assert "scores.weight" in str(report)


def test_gradients_pass_the_rounding() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(5, 64)
    ig.prepare(model, ig.plan(model, target="tensorrt", scheme="w8a8", example_inputs=(x,)))
    head, hidden = model[2], torch.randn(5, 64, requires_grad=True)
    y = head(hidden)
    y.sum().backward()
    rounded, weight = hidden.detach().half().float(), head.weight.detach().half().float()
    assert torch.equal(y.detach(), F.linear(rounded, weight, head.bias.detach().half().float()).half().float())
    assert torch.equal(head.weight.grad, torch.ones(4, 5) @ rounded)
    assert torch.equal(hidden.grad, torch.ones(5, 4) @ weight)
    assert torch.equal(head.bias.grad, torch.full((4,), 5.0))


def test_reports_and_searches_know_them() -> None:
    """float16 has too many values to draw a grid of; and which bits heads have is no question of a budget."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 10)), torch.randn(4, 32)
    plan = ig.plan(model, target="tensorrt", scheme="w8a8", example_inputs=(x,))
    found = ig.fit_types(model, plan, budget=6.0, formats=["int4/channel", "int8/channel"])
    assert {rule.match for rule in found} == {"re:0", "re:2"}
    ig.calibrate(ig.prepare(model, plan), [x])
    head = layers(model)[-1]
    assert (head.name, head.format, head.grid_values) == ("3", "float16", ())
    assert layer_figure(head) is not None
    assert "weight=float16, input=float16, output=float16" in str(model)


def test_rules_decide() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4)), (torch.zeros(1, 64),)
    rules = [ig.Rule(match="0", weight="float16"), ig.Rule(match="3", keep="float")]
    plan = ig.plan(model, target="tensorrt", scheme="w8a8", rules=rules, example_inputs=x)
    assert {layer.path: layer.arithmetic for layer in plan.layers} == {"2": "static", "0": "half"}
    assert plan.site("0.weight").reason == "rule '0'"
    assert dict(plan.floats)["3"] == "rule '3'"
    assert ig.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="'scale' has no effect"):
        rule = ig.Rule(match="0", weight="float16", scale="frozen")
        ig.plan(model, target="tensorrt", scheme="w8a8", rules=[rule], example_inputs=x)
