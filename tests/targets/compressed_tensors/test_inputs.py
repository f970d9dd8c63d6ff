"""What is done to inputs in four bits, against the package compressed-tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isogrid.errors import TargetError
from isogrid.formats import Affine, named_format
from isogrid.layers.dynamic import activation_rule
from isogrid.targets.compressed_tensors.config import INPUTS, Storage

pytest.importorskip("compressed_tensors")


def theirs(x: Tensor, rule: str, global_scale: float | None = None) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    module: Any = nn.Module()
    module.quantization_status = QuantizationStatus.COMPRESSED
    if global_scale is not None:
        module.input_global_scale = torch.tensor([global_scale])
    return forward_quantize(module, x, "input", QuantizationArgs(**INPUTS[rule]))


def inputs() -> Tensor:
    """bfloat16 [4096, 64] of many magnitudes, with zeros, ties and single large values."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=draw) * torch.exp2(torch.randint(-12, 9, (4096, 1), generator=draw))
    x[::7, 5] *= 100
    x[::5, 32:] = 0
    x[::3] = (x[::3] * 4).round() / 4
    return x.clamp(-2600, 2600).bfloat16()


def test_mxfp4_inputs_are_those_of_compressed_tensors() -> None:
    x = inputs()
    assert torch.equal(activation_rule("mxfp4-group32")(x), theirs(x, "mxfp4-group32"))
    assert torch.equal(activation_rule("mxfp4-group32")(x.float()), theirs(x.float(), "mxfp4-group32"))


@pytest.mark.parametrize("exponent", [-3, 0, 2])
def test_nvfp4_inputs_are_those_of_compressed_tensors(exponent: int) -> None:
    x, fmt = inputs(), named_format("nvfp4-local")
    ours = fmt.nearest(x, Affine(torch.full((1, 1), 2.0**exponent))).to(x.dtype)
    assert torch.equal(ours, theirs(x, "nvfp4-local", 2.0**-exponent))


def test_nvfp4_inputs_need_nvfp4_weights() -> None:
    for weight, activations in (("int8/channel", "nvfp4-local"), ("nvfp4:global=0", "int8/tensor")):
        with pytest.raises(TargetError, match="do not go with"):
            Storage(named_format(weight), activations)


def test_the_scale_of_nvfp4_inputs_leaves_room() -> None:
    x = inputs()
    scale = named_format("nvfp4-local").stored(named_format("nvfp4-local").default_affine(x)).scale
    assert scale is not None and torch.frexp(scale)[0].item() == 0.5
    assert 1024 <= float(x.abs().max() / scale) <= 2048
