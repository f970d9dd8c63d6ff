"""Schemes named after torch.ao's backends, held against torch.ao's own configurations of these names."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig, get_default_qconfig

import isogrid as ig
from isogrid.errors import TargetError
from isogrid.formats import IntegerGrid, PerChannel, PerTensor, named_format
from isogrid.planning import SCHEMES
from isogrid.targets import TARGETS
from tests.targets.proving import all_integer

TORCH_AO = ("x86", "fbgemm", "onednn", "qnnpack")


# torch.ao warns of its own defaults.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TORCH_AO)
def test_formats_are_those_of_torch_ao(name: str) -> None:
    scheme = SCHEMES[name]
    weight, activation = named_format(scheme.weight), named_format(scheme.activation or "")
    for config in (get_default_qconfig(name), get_default_qat_qconfig(name)):
        made = config.activation()
        observer = getattr(made, "activation_post_process", made)
        assert (observer.quant_min, observer.quant_max) == (activation.grid.lowest, activation.grid.highest)
        assert observer.dtype == torch.quint8
        assert activation.zero_point is not None and observer.qscheme == torch.per_tensor_affine
    made = get_default_qat_qconfig(name).weight()
    assert weight.grid == IntegerGrid(made.quant_min, made.quant_max) and weight.is_symmetric
    expected = {torch.per_channel_symmetric: PerChannel(), torch.per_tensor_symmetric: PerTensor()}
    assert weight.granularity == expected[made.qscheme]


def test_a_scheme_brings_its_target_unless_another_is_named() -> None:
    assert all(scheme.target in TARGETS for scheme in SCHEMES.values())
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4)
    for scheme in SCHEMES.values():
        if scheme.arithmetic == "static":
            layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
            plan = ig.plan(layers, scheme=scheme.name, example_inputs=(torch.zeros(1, 32),))
            assert plan.target == scheme.target and plan.layers
    assert ig.plan(model, scheme="x86", example_inputs=(x,)).target == "onnxruntime"
    nowhere = ig.planning.Scheme("mine", "int8/channel", "uint8/tensor", "static", "", target="nowhere")
    with pytest.raises(TargetError, match="nowhere"):
        ig.plan(model, scheme=nowhere, example_inputs=(x,))
    assert ig.plan(model, "onnxruntime", nowhere, example_inputs=(x,)).scheme == "mine"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.second(x) + x).mean((2, 3)))


@pytest.mark.parametrize("name", ["x86", "qnnpack"])
def test_they_run_in_integers_bit_for_bit(name: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    all_integer(Small(), (x,), tmp_path, scheme=name)
