"""Models as people write them, unchanged, from plan to verification; and inputs that do not fit."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import ArtifactError, PlanError, TargetError


@dataclass
class Output:
    """Like the output classes of transformers, and unknown to torch."""

    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Takes flags away from the forward, as transformers' decorators do."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("return_dict", None)
        return forward(self, *args, **kwargs)

    return wrapper


class Encoder(nn.Module):
    """Tokens with a mask that may be missing; one layer is called twice, and a weight is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.register_buffer("positions", torch.arange(6).expand(1, -1))
        self.shared, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    @decorated
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden: bool = False) -> Output:
        x = self.embedding(input_ids) + self.position(self.positions[:, : input_ids.shape[1]])
        x = x.to(self.shared.weight.dtype)
        hidden = []
        for _ in range(2):
            x = F.relu(self.shared(x)) + x
            hidden.append(x)
        if attention_mask is not None:
            x = x.masked_fill(~attention_mask[..., None].bool(), 0.0)
        return Output(self.head(x), tuple(hidden) if output_hidden else None)


class Fused(nn.Module):
    """One dictionary with a list in it, and a dictionary back."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.tabular = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Linear(5, 4)

    def forward(self, batch: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
        image = F.relu(self.norm(self.convolution(batch["image"]))).mean((2, 3))
        found = [self.tabular(x) + image for x in batch["tables"]]
        return {"first": found[0] * scale, "rest": found[1:], "nothing": None}


class Shifting(nn.Module):
    """Decides in Python by values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x * 2 if x.sum() > 0 else x


def tokens() -> dict[str, Any]:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    flags = {"return_dict": True, "output_hidden": True}
    return {"input_ids": torch.randint(0, 20, (2, 5)), "attention_mask": mask, **flags}


def fused() -> tuple[dict[str, Any], float]:
    return {"image": torch.randn(2, 3, 6, 6), "tables": [torch.randn(2, 5), torch.randn(2, 5)]}, 0.5


def trained(model: nn.Module, batches: list[Any], example: Any) -> nn.Module:
    """Prepared, calibrated and trained for two steps."""
    ig.calibrate(ig.prepare(model, ig.plan(model, example_inputs=example)), batches)
    optimizer = torch.optim.SGD(ig.parameter_groups(model, lr=1e-3))
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        result = model(**batch) if isinstance(batch, dict) else model(*batch)
        output = result.logits if isinstance(result, Output) else result["first"]
        output.square().mean().backward()
        optimizer.step()
    return model


def test_keywords_none_flags_and_dataclasses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [tokens(), tokens()]
    model = trained(Encoder(), batches, batches[0])
    artifact = ig.export(model, tmp_path / "model.onnx")
    assert ig.load(artifact.path).input_names == ["input_ids", "attention_mask"]
    report = ig.verify(model, artifact, [*batches, {**tokens(), "labels": torch.zeros(2)}], lambda y, _: y.logits.sum())
    assert report, report.failures
    assert report.differing_codes == 0 and report.compared_codes > 0
    assert len(report.outputs) == 3  # the logits and two hidden states
    with pytest.raises(PlanError, match="made with return_dict=True, but a batch has False"):
        ig.verify(model, artifact, [{**tokens(), "return_dict": False}])


def test_a_mask_that_is_not_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = (torch.randint(0, 20, (2, 5)), None)
    model = Encoder()
    plan = ig.plan(model, example_inputs=example)
    assert [spec.name for spec in plan.inputs] == ["input_ids"] and ig.Plan.from_json(plan.to_json()) == plan
    ig.calibrate(ig.prepare(model, plan), [example, (example[0], torch.zeros(2)), {"input_ids": example[0]}])
    assert ig.verify(model, ig.export(model, tmp_path / "model.onnx"), [example[0]])


def test_nested_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [fused(), fused()]
    model = trained(Fused(), batches, batches[0])
    artifact = ig.export(model, tmp_path / "model.onnx")
    assert ig.load(artifact.path).input_names == ["batch.image", "batch.tables.0", "batch.tables.1"]
    report = ig.verify(model, artifact, batches)
    assert report, report.failures
    assert report.differing_codes == 0 and len(report.outputs) == 2
    with pytest.raises(PlanError, match="a dictionary with image, tables"):
        ig.calibrate(model, [({"image": batches[0][0]["image"]}, 0.5)])
    with pytest.raises(PlanError, match=r"'batch\.tables' is a sequence of 2"):
        ig.calibrate(model, [({**batches[0][0], "tables": []}, 0.5)])


def test_python_that_looks_at_values_trains_and_is_named_at_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), Shifting()), torch.randn(3, 4)
    ig.calibrate(ig.prepare(model, ig.plan(model, example_inputs=(x,))), [x])
    model(x).sum().backward()
    with pytest.raises(TargetError, match=r"forward of '1', a Shifting \(test_zoo\.py, line \d+\), decides in Python"):
        ig.export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_argument_that_no_plan_can_hold() -> None:
    with pytest.raises(PlanError, match="'attention_mask' is a slice"):
        ig.plan(Encoder(), example_inputs={"input_ids": torch.zeros(1, 5).long(), "attention_mask": slice(3)})
    with pytest.raises(PlanError, match="a tuple of the arguments of forward"):
        ig.plan(Encoder(), example_inputs=torch.zeros(1, 5).long())  # type: ignore[arg-type]


def test_other_shapes_than_the_artefact_takes_are_said(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)), torch.randn(2, 3, 6, 6)
    ig.calibrate(ig.prepare(model, ig.plan(model, example_inputs=(x,))), [x])
    artifact = ig.export(model, tmp_path / "model.onnx")
    assert ig.verify(model, artifact, [x, x[:1], torch.randn(5, 3, 6, 6)])  # any number of examples
    with pytest.raises(TargetError, match=r"cannot run .* float32 \[2, 3, 8, 8\]"):
        ig.load(artifact.path)(torch.randn(2, 3, 8, 8))


def test_options_that_contradict_the_artefact_are_refused(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    ig.calibrate(ig.prepare(model, ig.plan(model, example_inputs=(x,))), [x])
    artifact = ig.export(model, tmp_path / "model.onnx")
    sidecar = tmp_path / "model.onnx.json"
    content = json.loads(sidecar.read_text())
    content["session_options"]["session.x64quantprecision"] = "0"
    sidecar.write_text(json.dumps(content))
    for use in (lambda: ig.load(artifact.path), lambda: ig.verify(model, artifact, [x])):
        with pytest.raises(ArtifactError, match=r"session\.x64quantprecision"):
            use()
