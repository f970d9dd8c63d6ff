"""LiteRT computes, bit for bit, what `isogrid.convert` says."""

import re
import runpy
from pathlib import Path

import pytest

import isogrid as ig
from tests.models import make, train

TFMOT = Path(__file__).parents[2] / "docs" / "how-to" / "from-tfmot.md"

pytestmark = pytest.mark.runtime("litert")


def exported(name, tmp_path, steps=2):
    """A model of tests/models.py, prepared for LiteRT, trained a little and exported."""
    model, inputs = make(name)
    ig.prepare(model, ig.plan(model, target="litert", scheme="w8a8", example_inputs=inputs))
    ig.calibrate(model, [inputs])
    train(model, inputs, steps, lr=0.001)
    return model, inputs, ig.export(model.eval(), tmp_path / "model.tflite")


@pytest.mark.parametrize("name", ["residual", "geometries", "shared", "two inputs", "forked", "gated", "curved"])
def test_no_code_differs(name, tmp_path):
    model, inputs, artifact = exported(name, tmp_path)
    shorter, longer = (tuple(x[:1] * 3 for x in inputs), tuple(x.repeat_interleave(3, 0) for x in inputs))
    report = ig.verify(model, artifact, [inputs, shorter, longer])
    assert report, str(report)
    assert report.sites and all(site.differing == 0 for site in report.sites)


def test_what_the_converter_makes_of_a_float_pooling_is_found(tmp_path):
    model, inputs, artifact = exported("sequential", tmp_path)
    report = ig.verify(model, artifact, [inputs])
    assert [failure.partition(":")[0] for failure in report.failures] == ["operation 7.input"]


def test_the_page_from_tfmot_ends_in_a_file_that_computes_what_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = re.findall(r"^```py(?:thon)?\n(.*?)^```", TFMOT.read_text(), re.MULTILINE | re.DOTALL)
    Path("page.py").write_text("\n".join(steps))
    report = runpy.run_path("page.py")["report"]
    assert report and report.differing_codes == 0 and report.end_to_end.logits_equal
    assert {check.arithmetic for check in report.graph} == {"integer"}
    assert Path("model.tflite").exists()
