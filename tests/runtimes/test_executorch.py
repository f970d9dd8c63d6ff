"""ExecuTorch's XNNPACK computes, bit for bit, what `isogrid.convert` says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isogrid as ig
from isogrid.layers.elementwise import IntegerAdd
from isogrid.layers.integer import IntegerAveragePool, StaticGrid
from isogrid.targets.decomposed import decompose
from isogrid.targets.subprocesses import Worker
from tests.models import make, train

pytestmark = pytest.mark.runtime("executorch")


def exported(name, tmp_path, steps=2):
    """A model of tests/models.py, prepared for ExecuTorch, trained a little and exported."""
    model, inputs = make(name)
    ig.prepare(model, ig.plan(model, target="executorch", scheme="w8a8", example_inputs=inputs))
    ig.calibrate(model, [inputs])
    train(model, inputs, steps, lr=0.001)
    return model, inputs, ig.export(model.eval(), tmp_path / "model.pte")


@pytest.mark.parametrize("name", ["residual", "spellings", "geometries", "sequential", "shared", "two inputs", "gated"])
def test_no_code_differs(name, tmp_path):
    model, inputs, artifact = exported(name, tmp_path)
    shorter, longer = (tuple(x[:1] * 3 for x in inputs), tuple(x.repeat_interleave(3, 0) for x in inputs))
    report = ig.verify(model, artifact, [inputs, shorter, longer])
    assert report, str(report)
    assert report.sites and all(site.differing == 0 for site in report.sites)


class EveryPair(nn.Module):
    """Sums, products and means on grids of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.sums = nn.ModuleList(IntegerAdd([grid(1.0), grid(1.0)], grid(2.0), "xnnpack") for _ in range(2))
        self.sums.extend(IntegerAdd([grid(), grid()], grid(), "xnnpack") for _ in range(6))
        self.means = nn.ModuleList(IntegerAveragePool([grid(1.0)], grid(2.0**-k), "xnnpack") for k in range(4))

    def forward(self, *inputs):
        pairs = zip(self.sums, inputs[::2], inputs[1::2], strict=False)
        sums = [site(torch.add, a, b) for site, a, b in pairs]
        rest = inputs[2 * len(self.sums) :]
        return (*sums, *(site(F.adaptive_avg_pool2d, x, 1) for site, x in zip(self.means, rest, strict=True)))


def grid(scale=None):
    """A grid; scales that are given make ties."""
    scale = torch.tensor([scale]) if scale else torch.exp(torch.empty(1).uniform_(-2, 1))
    return StaticGrid(scale, torch.randint(-128, 128, (1,), dtype=torch.int8), -128, 127)


def test_every_pair_of_codes_is_added_alike_and_means_round_alike(tmp_path):
    module = EveryPair()
    codes = torch.arange(-128, 128, dtype=torch.int8)
    pair = codes.repeat_interleave(256).reshape(1, 1, 256, 256), codes.repeat(256).reshape(1, 1, 256, 256)
    inputs = []
    for site in module.sums:
        inputs += [torch.ops.isogrid.dequantize(x, *site.grid(n)) for x, n in zip(pair, site.names, strict=True)]
    images = torch.randint(-128, 128, (32, 16, 4, 4), dtype=torch.int8)
    inputs += [torch.ops.isogrid.dequantize(images, *site.grid("input")) for site in module.means]
    torch.export.save(decompose(module, tuple(inputs)).program, tmp_path / "forward.pt2")
    worker = Worker("executorch")
    programs, path = {"forward": str(tmp_path / "forward.pt2")}, str(tmp_path / "model.pte")
    worker.call("lower", programs=programs, note="", path=path, quantized=True)
    worker.call("load", path=path, threads=1)
    answer = worker.call("run", {str(number): x for number, x in enumerate(inputs)}, method="forward")
    expected = module(*inputs)
    assert answer.value == len(expected)
    for number, values in enumerate(expected):
        assert torch.equal(answer.tensors[str(number)], values), number


@pytest.mark.parametrize("scheme", ["8da8w", "8da4w"])
def test_rows_that_it_quantises_itself(scheme, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False))
    inputs = (torch.randn(6, 5, 64),)
    ig.prepare(model, ig.plan(model, scheme=scheme, example_inputs=inputs))
    train(model, inputs, 2, lr=0.001)
    artifact = ig.export(model.eval(), tmp_path / "model.pte")
    report = ig.verify(model, artifact, [inputs, (torch.randn(6, 5, 64) * 5 + 2,)])
    assert report, str(report)
    products = [check for check in report.replays if check.name in ("0.output", "2.output")]
    assert len(products) == 2 and max(check.max_difference for check in products) <= 1e-6
    assert {check.arithmetic for check in report.graph} == {"integer"}
    assert report.parameters and all(check.differing == 0 for check in report.parameters)
