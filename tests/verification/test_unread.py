"""What an artefact need not have: what no output depends on, and what is computed twice."""

from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.verification.flow import Flow
from isogrid.verification.survey import Work, survey
from tests.verification.examples import edited, exported


class Auxiliary(nn.Module):
    """A head for training alone, and a sum that is computed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.auxiliary = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.kept = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.body(x))
        self.auxiliary(y)
        self.kept(y)
        return self.head(y + x) + self.other(y + x)


def test_what_no_output_depends_on_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model, artifact = exported(Auxiliary(), (x,), tmp_path / "model.onnx", rules=[ig.Rule(match="kept", keep="float")])
    report = ig.verify(model, artifact, [x])
    assert report, report.failures
    assert set(report.unread) == {"auxiliary.0.output"}
    assert "no output depends on them: auxiliary.0.output" in str(report)
    nothing = {check.name: check.operator for check in report.graph if check.arithmetic == "no"}
    assert set(nothing) == {"auxiliary.0", "auxiliary.2", "kept"}
    assert set(nothing.values()) == {"nothing: no output depends on it"}


def test_what_an_output_depends_on_is_missed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model, artifact = exported(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (x,), tmp_path / "m.onnx")
    onnx_model = onnx.load(artifact.path)
    for node in onnx_model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["renamed" if name == "0.output" else name for name in names]
    path = edited(artifact, lambda model: model.CopyFrom(onnx_model), tmp_path / "edited.onnx")
    report = ig.verify(model, path, [x])
    assert "site 0.output: the artefact does not quantise it" in report.failures and not report.unread


class Changing(nn.Module):
    """Results that travel by memory and by Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.decides, self.twice, self.nothing = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        buffer = torch.zeros(2, 4)
        buffer[:] = self.written(x)
        shift = float(self.decides(x).sum())
        self.nothing(x)
        return buffer + shift + self.twice(x) * self.twice(x) + self.twice(x + 1)


def test_reading_goes_through_memory_and_python() -> None:
    model, x = Changing(), torch.randn(2, 4)
    found = survey(model, lambda inputs: model(*inputs), (x,))
    assert found.work == [
        Work("written", "written", 32),
        Work("decides", "decides", 32),
        Work("nothing", "nothing", 32, read=False),
        Work("twice", "twice", 32),
        Work("twice_2", "twice", 32, repeated=True),
        Work("twice_3", "twice", 32),
    ]
    assert found.unread_modules == {"nothing"}


def test_numbers_are_of_values() -> None:
    flow = Flow()
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64):
        for shape in ((), (0,), (3, 2)):
            x = torch.ones(shape, dtype=dtype)
            assert flow.number(x) == flow.number(x.clone())
            assert not x.numel() or flow.number(x) != flow.number(torch.zeros(shape, dtype=dtype))
    x = torch.ones(3)
    before = flow.number(x)
    x[0] = 2
    assert flow.number(x) != before
