"""MatMulNBits against ONNX Runtime. Both sides add in float32, each in its own order: hence a tolerance."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from isogrid.errors import TargetError
from isogrid.layers import nbits

# Rounding of sums of 256 products, each at most 2^-24 of the partial sum.
TOLERANCE = 1e-6


def run(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: int,
    level: int,
) -> Tensor:
    tensors = {"packed": packed, "scales": scales, "zeros": zeros, "bias": bias}
    names = [
        name if name == "" or tensors[name] is not None else "" for name in ("packed", "scales", "zeros", "", "bias")
    ]
    node = helper.make_node(
        *("MatMulNBits", ["x", *names], ["y"]),
        domain="com.microsoft",
        K=x.shape[-1],
        N=packed.shape[0],
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(t.numpy(), name) for name, t in tensors.items() if t is not None],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0]))


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("block", nbits.BLOCKS)
@pytest.mark.parametrize("bits", nbits.BITS)
def test_matmul_nbits(bits: int, block: int, asymmetric: bool) -> None:
    torch.manual_seed(bits * block)
    outputs, inputs = 40, 256
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8)
    scales, bias = torch.rand(outputs, inputs // block) * 0.02 + 0.001, torch.randn(outputs)
    zeros = torch.randint(0, 2**bits, scales.shape, dtype=torch.uint8) if asymmetric else None
    packed = nbits.pack_matmul_nbits(codes, bits, block)
    packed_zeros = None if zeros is None else nbits.pack_zero_points(zeros, bits)
    for level in (1, 4):
        if not nbits.quantizes_input(bits, block, level) and level == 4:
            continue
        for rows in (1, 6):
            x = torch.randn(2, rows, inputs)
            x[0, 0, :block] = 0
            operands = (x, packed, scales, packed_zeros, bias, bits, block, level)
            assert largest_difference(nbits.matmul_nbits(*operands), run(*operands)) < TOLERANCE


def test_the_input_is_quantised_where_the_runtime_does_it() -> None:
    """Two bits in blocks of 16 or 256 stay in float at level 4."""
    torch.manual_seed(0)
    x = torch.randn(3, 256)
    for bits in nbits.BITS:
        for block in nbits.BLOCKS:
            packed = nbits.pack_matmul_nbits(torch.randint(0, 2**bits, (16, 256), dtype=torch.uint8), bits, block)
            scales = torch.rand(16, 256 // block)
            in_float = nbits.matmul_nbits(x, packed, scales, None, None, bits, block, 1)
            difference = largest_difference(run(x, packed, scales, None, None, bits, block, 4), in_float)
            assert nbits.quantizes_input(bits, block, 4) == (difference > 1e-4)


def test_signed_codes_are_the_unsigned_ones_around_the_middle() -> None:
    for bits in nbits.BITS:
        signed = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 64), dtype=torch.int8)
        unsigned = (signed.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        packed = nbits.pack_matmul_nbits(signed, bits, 32)
        assert torch.equal(packed, nbits.pack_matmul_nbits(unsigned, bits, 32))
        assert packed.shape == (3, 2, 32 * bits // 8)
        weight = nbits.dequantize_matmul_nbits(packed, torch.ones(3, 2), None, bits)
        assert torch.equal(weight, signed.float())


@pytest.mark.parametrize(("inputs", "bits", "block"), [(64, 3, 32), (64, 4, 48), (48, 4, 32), (1024, 4, 512)])
def test_what_matmul_nbits_does_not_know(inputs: int, bits: int, block: int) -> None:
    with pytest.raises(TargetError, match=r"2, 4 or 8 bits in blocks of 16, 32, 64, 128 or 256"):
        nbits.pack_matmul_nbits(torch.zeros(4, inputs, dtype=torch.uint8), bits, block)


def test_codes_of_the_input_are_those_of_the_runtime() -> None:
    """An identity for a weight shows the input as the runtime reads it; all values lie next to ties."""
    largest = torch.rand(512, 1) + 0.5
    scale = largest / torch.full_like(largest, 127.0)
    x = ((torch.arange(32) * 4 - 63.5) * scale).nextafter(torch.tensor(torch.inf))
    x[:, 0] = largest[:, 0]
    packed = nbits.pack_matmul_nbits(torch.eye(32, dtype=torch.int8), bits=8, block=32)
    found = run(x, packed, torch.ones(32, 1), None, None, 8, 32, 4)
    codes, _ = nbits.reciprocal_int8(x, 32)
    assert torch.equal((found / scale).round(), codes)
    twice = x * (1 / largest * 127)
    assert not torch.equal(twice.round(), codes)  # a reciprocal that is rounded twice shows
