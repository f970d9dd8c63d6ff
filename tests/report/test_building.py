"""What the report says of a model is what was exported and verified."""

from datetime import UTC, datetime
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.report import Report, model_report, render_report, result_row
from isogrid.report.building import fidelity
from isogrid.targets import Artifact
from tests.verification.examples import Mixed, Residual, Tokens, change, edited, exported

Case = tuple[nn.Module, Artifact, torch.Tensor]


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model whose batch norm turns the sign of half of its channels."""
    torch.manual_seed(0)
    x = torch.randn(8, 1, 8, 8)
    model = Residual()
    with torch.no_grad():
        model.stem[1].weight.copy_(torch.linspace(-1, 1, 8) + 0.1)
    return *exported(model, (x,), tmp_path_factory.mktemp("static") / "model.onnx", scheme="w4a8"), x


def test_a_static_model(static: Case) -> None:
    model, artifact, x = static
    verification = ig.verify(model, artifact, [x])
    report = model_report("W4A8", "qat", model, verification)
    assert [layer.name for layer in report.layers] == ["stem.0", "conv", "head"]
    assert [(row.site, row.format) for row in report.plan][:2] == [
        ("stem.0.weight", "int4/channel"), ("conv.weight", "int4/channel"),
    ]  # fmt: skip
    assert report.fidelity is not None and report.fidelity.holds
    assert report.fidelity.compared == verification.compared_codes and report.fidelity.logits_equal
    assert {row.operator for row in report.fidelity.graph} >= {"QLinearConv", "QGemm"}
    assert report.fidelity.integer_macs == report.fidelity.total_macs == 8 * 9 * 64 + 64 * 9 * 16 + 160
    row = result_row("W4A8", "qat", 0.5, artifact, verification, latency_ms=1.0)
    assert row.exact and row.size_bytes == artifact.size_bytes and row.logits_equal
    floating = result_row("W4A8", "float", 0.5, latency_ms=2.0)
    page = render_report(Report("t", "s", "ONNX Runtime", datetime(2026, 1, 1, tzinfo=UTC), (floating, row), (report,)))
    assert "stem.0" in page


def test_the_histogram_counts_the_codes_that_the_file_holds(static: Case) -> None:
    model, artifact, _ = static
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(artifact.path).graph.initializer}
    for layer in model_report("W4A8", "ptq", model).layers:
        codes = stored[f"{layer.name}.weight"].astype("int32")
        assert layer.grid_counts == tuple(int((codes == value).sum()) for value in layer.grid_values)
        assert layer.saturation is not None and layer.sqnr_db is not None and layer.sqnr_db > 0
        assert layer.scale is not None and layer.scale.minimum > 0


def test_a_weight_only_model_and_one_with_float_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = torch.randint(0, 50, (3, 7))
    model, artifact = exported(Tokens(), (words,), tmp_path / "tokens.onnx", scheme="w4a16")
    report = model_report("W4A16", "ptq", model, ig.verify(model, artifact, [words]))
    assert [layer.name for layer in report.layers] == ["words", "up", "down"]
    assert [layer.scale.count for layer in report.layers if layer.scale] == [50 * 2, 128 * 2, 20 * 4]
    assert report.fidelity is not None and report.fidelity.holds and report.fidelity.integer_macs == 0
    x = torch.randn(4, 1, 6, 6)
    rules = [ig.Rule(match="kept", keep="float")]
    model, artifact = exported(Mixed(), (x,), tmp_path / "mixed.onnx", rules=rules)
    report = model_report("W8A8", "ptq", model, ig.verify(model, artifact, [x]))
    assert ("kept", "rule 'kept'") in {(row.name, row.reason) for row in report.floats}
    assert report.fidelity is not None and 0 < report.fidelity.integer_macs < report.fidelity.total_macs
    assert {row.bound for row in report.fidelity.replays} >= {"0 codes", "0 codes beyond 1e-06 relative"}


def test_a_verification_that_fails_is_a_fidelity_that_fails(static: Case, tmp_path: Path) -> None:
    model, artifact, x = static
    found = fidelity(ig.verify(model, edited(artifact, change("conv.weight"), tmp_path / "changed.onnx"), [x]))
    assert not found.holds
    assert next((row.name, row.measured) for row in found.bounds if not row.holds) == ("stored values that differ", 1)


def test_a_float_model_has_no_details() -> None:
    with pytest.raises(PlanError, match="not prepared"):
        model_report("CNN", "float", Residual())
    assert result_row("CNN", "float", 0.5).artifact is None
