"""The target torch-export: a .pt2 file that torch reads and runs."""

import pytest
import torch

import isogrid as ig
from isogrid.errors import ArtifactError
from tests.models import make, train


@pytest.mark.parametrize("name", ["residual", "sequential"])
def test_torch_runs_what_was_trained(name, tmp_path):
    model, inputs = make(name)
    ig.prepare(model, ig.plan(model, target="torch-export", scheme="w8a8", example_inputs=inputs))
    ig.calibrate(model, [inputs])
    train(model, inputs, 2, lr=0.001)
    artifact = ig.export(model.eval(), tmp_path / "model.pt2")
    report = ig.verify(model, artifact, [inputs, tuple(x[:2] for x in inputs)])
    assert report.sites and all(site.max_difference <= 1 for site in report.sites), str(report)
    assert all(check.differing == 0 for check in report.parameters)
    # These two models have no value near enough to a tie for float arithmetic to round it the other way.
    assert report, str(report)
    program = torch.export.load(artifact.path)
    assert torch.equal(program.module()(*inputs)[0], ig.load(artifact.path)(*inputs)[0])


def test_a_corrupt_file_is_an_error_of_ours(tmp_path):
    model, inputs = make("sequential")
    ig.prepare(model, ig.plan(model, target="torch-export", scheme="w8a8", example_inputs=inputs))
    ig.calibrate(model, [inputs])
    artifact = ig.export(model, tmp_path / "model.pt2")
    artifact.path.write_bytes(artifact.path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="corrupt or truncated"):
        ig.load(artifact.path)
