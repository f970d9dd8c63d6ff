"""llama.cpp's own kernels, quantisers and choice of types, asked one by one."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isogrid.formats import named_format
from isogrid.formats.ggml import pack_blocks, unpack_blocks
from isogrid.layers.dynamic import activation_rule
from isogrid.layers.ggml_functions import gelu
from isogrid.layers.llamacpp_activations import Q8_1, q8_codes, q8_k_codes
from isogrid.layers.stored import StoredLinear
from isogrid.planning.mixtures import MIXTURES, assign
from isogrid.quantizers import LSQ, MSE, Quantizer
from isogrid.targets.llamacpp import ACTIVATIONS
from isogrid.targets.subprocesses import Worker
from tests.formats.helpers import assert_equal
from tests.planning.test_mixtures import llama

pytestmark = pytest.mark.runtime("llamacpp")

KINDS = {
    **{"float16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q8_1": 9, "q2_k": 10, "q3_k": 11},
    **{"q4_k": 12, "q5_k": 13, "q6_k": 14, "q8_k": 15, "iq4_nl": 20, "bfloat16": 30, "tq1_0": 34, "tq2_0": 35},
    **{"mxfp4": 39, "nvfp4": 40, "q1_0": 41, "q2_0": 42},
}
"""ggml_type of ggml.h."""


@cache
def worker() -> Worker:
    return Worker("llamacpp", Path(__file__).parent / "ggml_checks.py")


def spread(rows: int, columns: int) -> Tensor:
    """Rows of many magnitudes, with ties, equal extremes and zeros among them."""
    x = torch.randn(rows, columns) * 10.0 ** torch.randint(-4, 4, (rows, 1))
    x[0] = 0
    x[1] = torch.arange(columns) - columns / 2
    x[2, ::2], x[2, 1::2] = 1.0, -1.0
    return x


def stored(x: Tensor, kind: str, block: int, size: int) -> Tensor:
    bytes_ = worker().call("activations", {"x": x}, kind=KINDS[kind], size=x.shape[1] // block * size)
    return bytes_.tensors["stored"].reshape(-1, size)


def test_gelu_is_the_one_of_the_runtime() -> None:
    every_half = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = torch.randn(2**15, generator=torch.Generator().manual_seed(0)) * 5
    x = torch.cat([every_half[~every_half.isnan()], between])[None]
    assert_equal(worker().call("gelu", {"x": x}).tensors["y"], gelu(x))


@pytest.mark.parametrize("kind", ["q8_0", "q8_1"])
def test_blocks_of_activations_are_stored_so(kind: str) -> None:
    x = spread(200, 256)
    found = stored(x, kind, 32, 34 if kind == "q8_0" else 36)
    codes, step = q8_codes(x.reshape(-1, 32))
    assert_equal(found[:, -32:].view(torch.int8).float(), codes + 0.0)
    assert_equal(found[:, :2].contiguous().view(torch.float16), step.half())
    if kind == "q8_1":
        sums = found[:, 2:4].contiguous().view(torch.float16).float()
        own = codes.sum(1, keepdim=True) * step.half().float()
        assert_equal(Q8_1().sum_error(x).reshape(-1, 1), sums - own)


def test_super_blocks_of_activations_are_stored_so() -> None:
    x = spread(200, 512)
    found = stored(x, "q8_k", 256, 292)
    codes, scale = q8_k_codes(x.reshape(-1, 256))
    assert_equal(found[:, 4:260].view(torch.int8).float(), codes + 0.0)
    assert_equal(found[:, :4].contiguous().view(torch.float32), scale)


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_products_are_those_of_the_kernel(name: str, rows: int) -> None:
    weight = torch.randn(64, 512) * torch.rand(64, 1) + 0.3 * torch.randn(64, 1)
    fmt = named_format(name)
    quantizer = Quantizer(fmt, (64, 512), MSE(), LSQ(), "frozen" if fmt.scale is None else "learned")
    quantizer.fit(weight)
    quantized = quantizer.quantize(weight)
    packed = quantized.codes.view(torch.uint8) if fmt.scale is None else pack_blocks(quantized)
    x = torch.randn(rows, 512) * 5 * torch.rand(rows, 1) + 0.5
    y = worker().call("product", {"x": x, "weight": packed}, kind=KINDS[name]).tensors["y"]
    if name == "nvfp4":  # a GGUF file has the scale of the whole tensor beside it
        assert quantized.scale is not None
        y = y * quantized.scale.affine.scale
    expected = StoredLinear(quantized, None, activation_rule(ACTIVATIONS[name]))(x)
    # The kernel adds up in an order of its own, in float32.
    assert (y - expected).abs().max() <= 1e-6 * y.abs().max()


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name in KINDS and "float" not in name])
def test_training_starts_with_no_more_error_than_the_quantiser(name: str) -> None:
    fmt = named_format(name)
    for x in (torch.randn(32, 512) * 0.02, torch.randn(32, 512) * torch.randn(32, 512).abs()):
        packed = worker().call("quantized", {"x": x}, kind=KINDS[name]).tensors["packed"]
        theirs = unpack_blocks(packed, fmt, (32, 512)).dequantize()
        quantizer = Quantizer(fmt, (32, 512), MSE(), LSQ(), "learned")
        quantizer.fit(x)
        ours = quantizer(x).detach()
        # Rounding of the last digit decides where both are the best there is, as for Q1_0.
        assert (ours - x).double().square().sum() <= (theirs - x).double().square().sum() * (1 + 1e-4)


FILE_TYPES = {
    **{"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13},
    **{"q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "q2_k_s": 21, "iq4_nl": 25, "tq1_0": 36},
    **{"tq2_0": 37, "q1_0": 40, "q2_0": 41},
}
"""llama_ftype of llama.h."""

NAMES = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    **{"mlp.down_proj": "ffn_down"},
}


def of_gguf(path: str) -> str:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", path)
    if found is None:
        return {"lm_head": "output.weight", "model.embed_tokens": "token_embd.weight"}[path]
    return f"blk.{found[1]}.{NAMES[found[2]]}.weight"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharing", [1, 2, 4])
@pytest.mark.parametrize("hidden", [256, 288, 1000])
@pytest.mark.parametrize("blocks", [1, 3, 16, 32])
def test_types_are_those_of_llama_quantize(blocks: int, hidden: int, sharing: int, tied: bool) -> None:
    weights = [w for w in llama(blocks, hidden, sharing, tied) if not (tied and w.path == "lm_head")]
    # It refuses rows that Q1_0 does not divide.
    asked = {name: number for name, number in FILE_TYPES.items() if name != "q1_0" or not hidden % 128}
    names, shapes = [of_gguf(w.path) for w in weights], [list(w.shape) for w in weights]
    found = worker().call("types", names=names, shapes=shapes, file_types=asked, layers=blocks, sharing=sharing).value
    everything = llama(blocks, hidden, sharing, tied)
    for name, types in found.items():
        ours = assign(name, MIXTURES[name].base, everything)
        assert [ours[w.path].weight.replace("float16", "f16") for w in weights] == types, name


@pytest.mark.parametrize(("blocks", "sharing", "experts"), [(80, 1, 1), (80, 8, 1), (80, 4, 8), (16, 4, 8), (16, 1, 4)])
def test_types_of_large_models_and_of_experts(blocks: int, sharing: int, experts: int) -> None:
    weights = llama(blocks, 256, sharing, experts=experts)
    names = [of_gguf(w.path.replace("projection", "proj").replace("experts.", "")) for w in weights]
    names = [re.sub(r"ffn_\w+", r"\g<0>_exps", name) if experts > 1 else name for name in names]
    facts = {"layers": blocks, "sharing": sharing, "experts": experts if experts > 1 else 0}
    found = worker().call("types", names=names, shapes=[w.shape for w in weights], file_types=FILE_TYPES, **facts).value
    for name, types in found.items():
        ours = assign(name, MIXTURES[name].base, weights)
        assert [ours[w.path].weight for w in weights] == types, name
