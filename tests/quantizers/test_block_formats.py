"""Block formats in training: a good start, steps that move all parts, and nothing that storage would change."""

import numpy as np
import pytest
import torch
from torch import Tensor

from isogrid.formats import named_format
from isogrid.quantizers import LSQ, MSE, AbsMax, Quantizer
from isogrid.quantizers.nested import is_nested, refined
from tests.formats.helpers import assert_equal

gguf = pytest.importorskip("gguf")

K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
WITH_OFFSETS = ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k")
NAMES = (
    *("q4_0", "q5_0", "q8_0", *WITH_OFFSETS, "q3_k", "q6_k", "iq4_nl", "tq1_0", "tq2_0", "mxfp4", "nvfp4"),
    *("q1_0", "q2_0"),
)


def weight(seed: int = 0) -> Tensor:
    return torch.randn(16, 512, generator=torch.Generator().manual_seed(seed)) * 0.02


def quantizer(name: str, x: Tensor) -> Quantizer:
    made = Quantizer(named_format(name), tuple(x.shape), MSE(), LSQ(), "learned")
    made.fit(x)
    return made


def error(x: Tensor, values: Tensor) -> float:
    return float((x.double() - values.double()).square().sum())


@pytest.mark.parametrize("name", NAMES)
def test_steps_move_weights_scales_and_offsets_and_storage_keeps_what_they_made(name: str) -> None:
    x = torch.nn.Parameter(weight())
    made = quantizer(name, x.detach())
    before = {key: value.clone() for key, value in made.state_dict().items()}
    optimizer = torch.optim.Adam([x, *made.parameters()], lr=1e-3)
    target = torch.randn(16, 512) * 0.02
    for _ in range(3):
        optimizer.zero_grad()
        (made(x) - target).square().sum().backward()
        optimizer.step()
    assert not torch.equal(x, weight())
    for part in ("raw_scale", "offset"):
        if part in before:
            assert not torch.equal(made.state_dict()[part], before[part])
    quantized = made.quantize(x)
    assert_equal(quantized.dequantize(), made(x).detach())
    assert_equal(made.format.fake_quantize(x.detach(), *made.affine(x)).detach(), quantized.dequantize())
    assert ("offset" in before) == (name in WITH_OFFSETS)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("iq4_nl", "nvfp4", "q1_0", "q2_0", *K_QUANTS)])
def test_the_start_is_no_worse_than_the_quantiser_of_gguf(name: str) -> None:
    for x in (weight(), weight() * weight(1).abs()):
        kind = gguf.GGMLQuantizationType[name.upper()]
        theirs = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
        assert error(x, quantizer(name, x)(x).detach()) <= error(x, torch.from_numpy(theirs))


# Signal-to-noise ratio in dB of ggml_quantize_chunk without an importance matrix, llama-cpp-python 0.3.36, on the same
# weights; gguf has no quantiser for these types.
OF_GGML = {"q2_k": 10.46, "q3_k": 16.41, "q4_k": 22.86, "q5_k": 28.82, "q6_k": 34.98, "iq4_nl": 22.35}


@pytest.mark.parametrize("name", OF_GGML)
def test_the_start_is_no_worse_than_the_quantiser_of_ggml(name: str) -> None:
    x = weight()
    ratio = 10 * np.log10(error(x, torch.zeros_like(x)) / error(x, quantizer(name, x)(x).detach()))
    assert ratio > OF_GGML[name]


@pytest.mark.parametrize("name", K_QUANTS)
def test_scales_that_share_a_scale_are_searched_for_together(name: str) -> None:
    fmt, x = named_format(name), weight()
    start = Quantizer(fmt, tuple(x.shape), AbsMax(), LSQ(), "learned")
    start.fit(x)
    better = refined(x, fmt, start.stored())
    values = fmt.fake_quantize(x, *better).detach()
    assert error(x, values) < error(x, start(x).detach())
    assert_equal(fmt.nearest(x, better), values)  # storage keeps them as they are
    assert is_nested(fmt) and not is_nested(named_format("nvfp4")) and not is_nested(named_format("q4_0"))


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q3_k", "q2_0", "iq4_nl"])
def test_the_longer_side_of_a_grid_is_turned_to_where_it_is_needed(name: str) -> None:
    fmt = named_format(name)
    values = fmt.grid.values()
    x = values.repeat(2, 256 // len(values)) * 2.0**-6  # the scales of q3_k are -31..31 times a float16
    for sign in (-1.0, 1.0):
        made = quantizer(name, sign * x)
        assert (made.scale * sign > 0).all()
        assert error(sign * x, made(sign * x).detach()) < 1e-8 * error(x, torch.zeros_like(x))


def test_a_negative_scale_keeps_its_sign_at_any_learning_rate() -> None:
    x = -named_format("q4_0").grid.values().repeat(4, 8)
    made = quantizer("q4_0", x)
    optimizer = torch.optim.SGD(made.parameters(), lr=1e6)
    for _ in range(3):
        assert (made.scale < 0).all() and made(x).isfinite().all()
        optimizer.zero_grad()
        (made(x) - torch.randn(4, 128)).square().sum().backward()
        optimizer.step()
    assert_equal(made.quantize(x).dequantize(), made(x).detach())


def test_blocks_of_zeros_stay_zeros() -> None:
    x = weight()
    x[0, :256] = 0
    for name in NAMES:
        values = quantizer(name, x)(x)
        assert values.isfinite().all()
        if name not in ("q1_0", "iq4_nl"):  # grids without a zero
            assert not values[0, :256].any(), name
