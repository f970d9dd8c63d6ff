"""The target torch-export: a .pt2 file that torch reads and runs."""

import pytest
import torch
from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

import isogrid as ig
from isogrid.errors import ArtifactError, TargetError
from isogrid.targets.torch_export import QUANTIZE
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


class Quantizations(torch.fx.Interpreter):
    """Runs a graph and keeps the codes that it makes, each with scale and zero point."""

    def run_node(self, n):
        result = super().run_node(n)
        if n.target is QUANTIZE:
            self.codes = [*getattr(self, "codes", []), (tuple(n.args[1:3]), result)]
        return result


def test_inductors_kernels_make_the_same_codes(tmp_path):
    model, inputs = make("residual")
    weights = ig.Rule(match="*", weight="int7/channel")  # without VNNI, 8 bits overflow oneDNN's sums of two products
    ig.prepare(model, ig.plan(model, "torch-export", "w8a8", [weights], example_inputs=inputs))
    ig.calibrate(model, [inputs])
    train(model, inputs, 2, lr=0.001)
    artifact = ig.export(model.eval(), tmp_path / "model.pt2")
    program = torch.export.load(artifact.path).module(check_guards=False)
    with torch.no_grad():
        lowered = lower_pt2e_quantized_to_x86(program, inputs)
        called = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
        assert called.count("onednn.qconv_pointwise.default") == 3
        assert called.count("onednn.qlinear_pointwise.default") == 1
        assert not any(name.startswith(("aten.conv", "aten.linear", "aten.addmm")) for name in called)
        watched = [Quantizations(graph) for graph in (program, lowered)]
        (expected,), (found,) = (watcher.run(*inputs) for watcher in watched)
    # Lowering drops what only repeats a quantisation, so look for each of its own, in order.
    eager = iter(watched[0].codes)
    compared = 0
    for grid, codes in watched[1].codes:
        same = next(theirs for known, theirs in eager if known == grid and theirs.shape == codes.shape)
        assert torch.equal(codes, same)
        compared += codes.numel()
    assert compared > 1000
    assert torch.equal(found, expected) and torch.equal(expected, ig.convert(model)(*inputs))


def test_a_format_that_the_kernels_do_not_take_is_refused_with_another():
    model, inputs = make("sequential")
    with pytest.raises(TargetError, match="int7/channel"):
        ig.plan(model, "torch-export", "x86", example_inputs=inputs)


class Repeated(torch.nn.Module):
    """Heads that are repeated, as keys and values are for grouped queries: a view of a copy of what was expanded."""

    def __init__(self):
        super().__init__()
        self.keys, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

    def forward(self, x):
        keys = self.keys(x)[:, :, None].expand(-1, -1, 2, -1)
        return self.head(keys.reshape(x.shape[0], -1, 8))


def test_a_view_of_a_copy_of_what_was_expanded(tmp_path):
    model, x = Repeated(), torch.randn(2, 3, 8)
    ig.prepare(model, ig.plan(model, "torch-export", "w8a8", example_inputs=(x,)))
    ig.calibrate(model, [x])
    report = ig.verify(model, ig.export(model, tmp_path / "model.pt2"), [x])
    assert report.sites and all(site.max_difference <= 1 for site in report.sites), str(report)
