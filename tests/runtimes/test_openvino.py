"""OpenVINO computes what was trained: every code, by power-of-two scales; nearly every one by others."""

from pathlib import Path

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import TargetError
from tests.targets.residual_networks import INPUTS, Portable, trained

pytestmark = pytest.mark.runtime("openvino")

MORE = [INPUTS, torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(2))]


def test_no_code_differs_by_powers_of_two(tmp_path: Path) -> None:
    model = trained("openvino")
    artifact = ig.export(model, tmp_path / "model.onnx")
    report = ig.verify(model, artifact, MORE)
    assert report, str(report)
    assert report.differing_codes == 0 and report.compared_codes > 100_000
    assert report.end_to_end.logits_equal
    assert {check.arithmetic for check in report.graph} == {"integer"}
    with torch.no_grad():
        loaded = ig.load(artifact.path)
        assert torch.equal(loaded(INPUTS)[0], model(INPUTS))
        assert torch.equal(loaded.observe(INPUTS).outputs[0], model(INPUTS))


@pytest.mark.parametrize(("channels", "kernel"), [(8, 1), (16, 3)])
def test_portable_as_it_runs_and_not_only_as_it_is_observed(channels: int, kernel: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Portable(channels, kernel)
    x = torch.randn(8, 3, 32, 32)
    halves = [ig.Rule(match="*", weight="int4/channel:scale=e8m0")]  # few bits, so that many products end in .5
    ig.prepare(model, ig.plan(model, "openvino", "portable", halves, example_inputs=(x,)))
    ig.calibrate(model, [x]).eval()
    artifact = ig.export(model, tmp_path / "model.onnx")
    # Means of 256 codes by powers of two: exact in any order. With 8 channels results once changed from run to run.
    loaded, expected = ig.load(artifact.path), ig.convert(model)(x)
    for _ in range(4):
        assert torch.equal(loaded(x)[0], expected)
    report = ig.verify(model, artifact, [x])
    assert report and report.differing_codes == 0, str(report)
    assert {check.arithmetic for check in report.graph} == {"integer"}


def test_verification_sees_a_rounding_that_is_dropped_only_as_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isogrid.targets.openvino.round_before_additions", lambda model: None)
    torch.manual_seed(0)
    model = nn.Sequential(Portable(16, 3), nn.Linear(16, 10))  # a head in float, so that no bits are demanded of it
    x = torch.randn(8, 3, 32, 32)
    halves = [ig.Rule(match="Conv2d", weight="int4/channel:scale=e8m0")]
    ig.prepare(model, ig.plan(model, "openvino", "portable", halves, example_inputs=(x,)))
    ig.calibrate(model, [x]).eval()
    report = ig.verify(model, ig.export(model, tmp_path / "model.onnx"), [x])
    assert not report and report.differing_codes == 0
    assert "the artefact as it is deployed" in report.failures[0]


def test_other_scales_hold_their_bound(tmp_path: Path) -> None:
    model = trained("openvino", rules=[ig.Rule(match="*", weight="int7/channel", activation="uint8/tensor")])
    report = ig.verify(model, ig.export(model, tmp_path / "model.onnx"), MORE)
    assert report, str(report)
    replays = [check for check in report.replays if check.of_codes]
    assert max(check.max_difference for check in replays) <= 1
    assert sum(check.differing for check in replays) <= 1e-3 * sum(check.compared for check in replays)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_packed_weights_multiply_floats(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
    x = torch.randn(16, 64)
    ig.prepare(model, ig.plan(model, target="openvino", scheme=scheme, example_inputs=(x[:1],)))
    report = ig.verify(model, ig.export(model, tmp_path / "model.onnx"), [x])
    assert report, str(report)
    assert {check.arithmetic for check in report.graph} == {"float"}
    assert max(check.max_difference for check in report.replays) <= 1e-6


def test_inputs_that_it_refuses(tmp_path: Path) -> None:
    loaded = ig.load(ig.export(trained("openvino"), tmp_path / "model.onnx").path)
    with pytest.raises(TargetError, match="takes 1 inputs"):
        loaded(INPUTS, INPUTS)
    with pytest.raises(TargetError, match="openvino failed"):
        loaded(INPUTS[:, :2])
