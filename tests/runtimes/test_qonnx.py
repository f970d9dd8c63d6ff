"""The package qonnx computes what was trained: every code, at any number of bits."""

from pathlib import Path

import pytest
import torch

import isogrid as ig
from isogrid.errors import TargetError
from isogrid.targets.subprocesses import Worker
from tests.targets.residual_networks import INPUTS, trained
from tests.targets.test_qonnx import MIXED

pytestmark = pytest.mark.runtime("qonnx")


@pytest.mark.parametrize(("scheme", "rules"), [("finn", []), ("w8a8", MIXED)])
def test_no_code_differs(scheme: str, rules: list[ig.Rule], tmp_path: Path) -> None:
    model = trained("qonnx", scheme, rules)
    report = ig.verify(model, ig.export(model, tmp_path / "model.onnx"), [INPUTS])
    assert report, str(report)
    assert report.differing_codes == 0 and report.end_to_end.logits_equal
    assert {check.arithmetic for check in report.graph} == {"integer"}


def test_its_own_conversion_to_qcdq_computes_the_same(tmp_path: Path) -> None:
    model = trained("qonnx", "finn")
    artifact = ig.export(model, tmp_path / "model.onnx")
    worker = Worker("qonnx", Path(__file__).parent / "qonnx_checks.py")
    found = worker.call("as_qcdq", {"x": INPUTS[:1]}, path=str(artifact.path)).tensors
    assert torch.equal(found["as_qcdq"], found["as_quant"])
    with torch.no_grad():
        assert torch.equal(found["as_quant"], model(INPUTS[:1]))


def test_thresholds_in_closed_form_are_its_multithreshold(tmp_path: Path) -> None:
    """A Quant of n unsigned bits is 2**n - 1 comparisons, as FINN computes it: code k from (k - 1/2) * scale on."""
    worker = Worker("qonnx", Path(__file__).parent / "qonnx_checks.py")
    scale = 0.25
    grid = ig.format("uint4/tensor:symmetric,scale=e8m0")
    x = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(0)) * 3
    thresholds = (torch.arange(1, 16) - 0.5) * scale
    # A tie goes to the even code: it lies below the threshold of an odd one.
    thresholds = torch.where(torch.arange(1, 16) % 2 == 1, thresholds.nextafter(torch.tensor(9.0)), thresholds)
    ties = torch.arange(25).reshape(1, 1, 5, 5) * scale / 2
    x = torch.cat([x, ties], dim=1)
    counts = worker.call("multithreshold", {"x": x, "thresholds": thresholds.expand(9, 15)}).tensors["counts"]
    assert torch.equal(counts, grid.quantize(x, torch.tensor(scale)).codes.float())


def test_brevitas_exports_the_same_quantisers(tmp_path: Path) -> None:
    """Brevitas' own export of the same layer at the same scales: the same parameters of Quant, the same outputs."""
    model = trained("qonnx", "finn")
    artifact = ig.export(model, tmp_path / "model.onnx")
    left = ig.convert(model).left
    values = {"weight": left.weight, "bias": left.bias.float() * left.input_scale * left.weight_scale}
    scales = {"input": left.input_scale, "weights": left.weight_scale, "output": left.output_scale}
    x = torch.rand(2, 16, 6, 6, generator=torch.Generator().manual_seed(0)) * 6
    worker = Worker("qonnx", Path(__file__).parent / "qonnx_checks.py")
    answer = worker.call("brevitas", {**values, **scales, "x": x}, path=str(tmp_path / "brevitas.onnx"))
    assert torch.equal(answer.tensors["y"], left(x))
    ours = worker.call("quantizers", path=str(artifact.path), prefix="left.").value
    theirs = {tuple(entry[1:]) for entry in answer.value}
    assert theirs >= {tuple(entry[1:]) for entry in ours if entry[0].startswith("left.")}


def test_a_batch_that_does_not_fit(tmp_path: Path) -> None:
    loaded = ig.load(ig.export(trained("qonnx", "finn"), tmp_path / "model.onnx").path)
    with pytest.raises(TargetError, match="takes 1 inputs"):
        loaded(INPUTS, INPUTS)
