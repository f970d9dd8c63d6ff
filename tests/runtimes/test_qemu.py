"""ONNX Runtime on an emulated Haswell, an x86 processor whose products of u8 and s8 can overflow.

VPMADDUBSW adds pairs of products in 16 bits and saturates. Newer processors (VNNI) have an instruction that does not.
An artefact's session options must give the same codes on both.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.targets.onnx_runtime_session import quantized_tensors
from tests.models import assert_equal, prepared

pytestmark = pytest.mark.runtime("qemu")

EMULATOR = ("qemu-x86_64", "-cpu", "Haswell")
PRECISION = "session.x64quantprecision"


class Net(nn.Module):
    """A convolution, a depthwise one, a residual, a linear layer: the kernels that ONNX Runtime has for x86."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.point, self.head = nn.Conv2d(64, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.point(torch.relu(self.depthwise(x))) + x)
        return self.head(x.mean((2, 3)))


class Case:
    """One model, its artefact, and what it computes here."""

    def __init__(self, folder: Path, scheme: str, weight: str | None, options: dict[str, str] | None):
        torch.manual_seed(0)
        rules = [ig.Rule(match="*", weight=weight, range="absmax")] if weight else []
        # All positive weights on positive inputs make the largest sums of pairs.
        model = Net()
        with torch.no_grad():
            for parameter in (model.stem.weight, model.point.weight, model.head.weight):
                parameter.abs_()
        x = torch.rand(4, 8, 10, 10)
        self.x, self.model = x, prepared(model, (x,), scheme=scheme, rules=rules).eval()
        self.artifact = ig.export(self.model, folder / "model.onnx")
        assert ig.verify(self.model, self.artifact, [(x,)])
        self.codes = dict(ig.load(self.artifact.path).observe(x).codes)
        self.job = self._job(folder, self.artifact.session_options if options is None else options)

    def _job(self, folder: Path, options: dict[str, str]) -> dict[str, Any]:
        file = onnx.load(self.artifact.path)
        (name,) = (value.name for value in file.graph.input)
        present = {value.name for value in file.graph.output}
        file.graph.output.extend(onnx.ValueInfoProto(name=n) for n in quantized_tensors(file) if n not in present)
        onnx.save(file, folder / "observed.onnx")
        np.savez(folder / "inputs.npz", **{name: self.x.numpy()})
        paths = {"inputs": folder / "inputs.npz", "outputs": folder / "outputs.npz", "model": folder / "observed.onnx"}
        return {"options": options, **{key: str(path) for key, path in paths.items()}}

    def differing(self) -> dict[str, int]:
        """How many codes the other processor computed differently, by tensor; and its logits against the model's."""
        with np.load(self.job["outputs"]) as stored:
            others = {name: torch.from_numpy(stored[name]) for name in stored}
        (logits,) = (value for name, value in others.items() if name not in self.codes)
        found = {name: int((others[name] != codes).sum()) for name, codes in self.codes.items()}
        if not any(found.values()):
            assert_equal(logits, ig.convert(self.model)(self.x))
        return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All cases, run by one start of the emulator."""
    assert shutil.which(EMULATOR[0]), f"{EMULATOR[0]} is not installed: apt-get install qemu-user"
    made = {
        "as exported": ("w8a8", "int8/channel", None),
        "without the option": ("w8a8", "int8/channel", {}),
        "weights of 7 bits, without": ("w8a8", "int7/channel", {}),
        "activations of 7 bits, as exported": ("x86", None, None),
    }
    found = {name: Case(tmp_path_factory.mktemp("case"), *arguments) for name, arguments in made.items()}
    jobs = tmp_path_factory.mktemp("jobs") / "jobs.json"
    jobs.write_text(json.dumps([case.job for case in found.values()]))
    script = Path(__file__).with_name("onnx_codes.py")
    done = subprocess.run([*EMULATOR, sys.executable, str(script), str(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return found


def test_an_artefacts_options_give_the_codes_of_the_model_everywhere(cases: dict[str, Case]) -> None:
    for name in ("as exported", "activations of 7 bits, as exported"):
        differing = cases[name].differing()
        assert len(differing) >= 6 and not any(differing.values()), (name, differing)


def test_without_them_products_overflow(cases: dict[str, Case]) -> None:
    """The check can fail: this is what the option is for."""
    assert cases["as exported"].artifact.session_options[PRECISION] == "1"
    assert any(cases["without the option"].differing().values())


def test_seven_bits_on_either_side_need_no_option(cases: dict[str, Case]) -> None:
    assert PRECISION not in cases["activations of 7 bits, as exported"].artifact.session_options
    for name in ("weights of 7 bits, without", "activations of 7 bits, as exported"):
        assert not any(cases[name].differing().values()), name
