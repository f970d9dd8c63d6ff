"""Every rule against ONNX Runtime itself: equal in every code."""

import random

import pytest
import torch
from torch import Tensor

from isogrid.layers import arithmetic
from tests.layers.codes import U8, all_equal, codes, scale, zero_point
from tests.layers.runtime import Graph


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def weight_scales(n: int, per_channel: bool) -> Tensor:
    return torch.cat([scale() for _ in range(n)]) if per_channel else scale()


def spread(factor: Tensor, x: Tensor) -> Tensor:
    """Per-channel factors along dimension 1."""
    return factor.view(1, -1, *[1] * (x.dim() - 2))


def accumulator_range(accumulator: Tensor) -> Tensor:
    """A scale that makes the output use its codes."""
    return (accumulator.double().abs().mean() / 64).float().clamp_min(1e-6).reshape(1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_quantize_is_quantize_linear(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    for _ in range(20):
        s, z = scale(), codes(1, low=limits.min, high=limits.max, dtype=dtype)
        halves = torch.arange(-600, 600).float() / 2 * s
        x = torch.cat([torch.randn(4096) * 60 * s, halves, torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, 0.0])])
        graph = Graph()
        y = graph.quantized(graph.input(x), s, z)
        all_equal(arithmetic.quantize(x, s, z, limits.min, limits.max), graph.run(y, dtype))


def test_dequantize_is_dequantize_linear() -> None:
    x = torch.arange(256, dtype=U8)
    for _ in range(20):
        s, z = scale(), zero_point()
        graph = Graph()
        y = graph.dequantized(graph.input(x), s, z)
        all_equal(arithmetic.dequantize(x, s, z), graph.run(y, torch.float32))


LINEAR_CASES = [
    # batch, inputs, outputs, largest weight, per channel
    (1, 1, 1, 127, False),
    (7, 33, 5, 127, True),
    (4, 256, 64, 8, True),
    (4, 300, 64, 2, True),
    (16, 513, 31, 127, False),
    (3, 1000, 17, 127, True),
    (2, 20000, 9, 127, True),
]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("batch", "inputs", "outputs", "largest", "per_channel"), LINEAR_CASES)
def test_linear_is_qgemm(batch: int, inputs: int, outputs: int, largest: int, per_channel: bool, relu: bool) -> None:
    for _ in range(4):
        x, zx, zy, sx = codes(batch, inputs), zero_point(), zero_point(), scale()
        zy = torch.zeros(1, dtype=U8) if relu else zy
        w = codes(outputs, inputs, low=-largest - 1, high=largest, dtype=torch.int8)
        sw = weight_scales(outputs, per_channel)
        bias = codes(outputs, low=-(2**16), high=2**16, dtype=torch.int32)
        accumulator = arithmetic.linear(x, zx, w, bias)
        sy = accumulator_range(accumulator * (sx * sw))

        graph = Graph()
        ws, wz = sw, torch.zeros(sw.shape, dtype=torch.int8)
        y = graph.node(
            "Gemm",
            [
                graph.dequantized(graph.input(x), sx, zx),
                graph.dequantized(graph.constant(w), ws, wz),
                graph.dequantized(graph.constant(bias), sx * sw, torch.zeros(sw.shape, dtype=torch.int32)),
            ],
            transB=1,
        )
        y = graph.quantized(graph.node("Relu", [y]) if relu else y, sy, zy)
        low = int(zy) if relu else 0
        ours = arithmetic.requantize(accumulator, arithmetic.multiplier(sx, sw, sy), zy, low, 255)
        all_equal(ours, graph.run(y, U8, expect="QGemm"))


@pytest.mark.parametrize(("batch", "inputs", "outputs", "largest", "per_channel"), LINEAR_CASES)
def test_float_output_of_qgemm(batch: int, inputs: int, outputs: int, largest: int, per_channel: bool) -> None:
    for has_bias in (True, False):
        x, zx, sx = codes(batch, inputs), zero_point(), scale()
        w = codes(outputs, inputs, low=-largest - 1, high=largest, dtype=torch.int8)
        sw = weight_scales(outputs, per_channel)
        bias = codes(outputs, low=-(2**16), high=2**16, dtype=torch.int32) if has_bias else None

        graph = Graph()
        operands = [
            graph.dequantized(graph.input(x), sx, zx),
            graph.dequantized(graph.constant(w), sw, torch.zeros(sw.shape, dtype=torch.int8)),
        ]
        if bias is not None:
            zeros = torch.zeros(sw.shape, dtype=torch.int32)
            operands.append(graph.dequantized(graph.constant(bias), sx * sw, zeros))
        y = graph.node("Gemm", operands, transB=1)
        ours = arithmetic.dequantize_accumulator(arithmetic.linear(x, zx, w, bias), sx, sw)
        all_equal(ours, graph.run(y, torch.float32, expect="QGemm"))


CONVOLUTION_CASES = [
    # shape of x, outputs, kernel, stride, padding, dilation, groups
    ((2, 3, 17), 8, [3], [1], [1], [1], 1),
    ((2, 8, 31), 8, [5], [2], [2, 1], [2], 4),
    ((2, 3, 9, 11), 7, [3, 3], [1, 1], [1, 1], [1, 1], 1),
    ((1, 16, 8, 8), 32, [1, 1], [1, 1], [0, 0], [1, 1], 1),
    ((3, 16, 8, 8), 16, [3, 3], [2, 2], [1, 1], [1, 1], 16),
    ((2, 12, 10, 9), 24, [3, 2], [2, 1], [1, 0], [1, 2], 3),
    ((1, 8, 12, 12), 8, [4, 4], [1, 1], [1, 1, 2, 2], [1, 1], 1),
    ((1, 160, 6, 6), 8, [3, 3], [1, 1], [1, 1], [1, 1], 1),
    ((2, 4, 5, 6, 7), 6, [3, 3, 3], [1, 2, 1], [1, 1, 1], [1, 1, 1], 2),
]


@pytest.mark.parametrize("largest", [127, 7, 1])
@pytest.mark.parametrize(("shape", "outputs", "kernel", "stride", "padding", "dilation", "groups"), CONVOLUTION_CASES)
def test_convolution_is_qlinear_conv(
    shape: tuple[int, ...],
    outputs: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    largest: int,
) -> None:
    for per_channel in (True, False):
        x, zx, zy, sx = codes(*shape), zero_point(), zero_point(), scale()
        w = codes(outputs, shape[1] // groups, *kernel, low=-largest - 1, high=largest, dtype=torch.int8)
        sw = weight_scales(outputs, per_channel)
        bias = codes(outputs, low=-(2**16), high=2**16, dtype=torch.int32)
        accumulator = arithmetic.convolution(x, zx, w, bias, stride, padding, dilation, groups)
        sy = accumulator_range(accumulator * spread(sx * sw, accumulator))

        graph = Graph()
        y = graph.node(
            "Conv",
            [
                graph.dequantized(graph.input(x), sx, zx),
                graph.dequantized(graph.constant(w), sw, torch.zeros(sw.shape, dtype=torch.int8)),
                graph.dequantized(graph.constant(bias), sx * sw, torch.zeros(sw.shape, dtype=torch.int32)),
            ],
            kernel_shape=kernel,
            strides=stride,
            pads=padding if len(padding) == 2 * len(kernel) else padding * 2,
            dilations=dilation,
            group=groups,
        )
        y = graph.quantized(y, sy, zy)
        factor = spread(arithmetic.multiplier(sx, sw, sy), accumulator)
        ours = arithmetic.requantize(accumulator, factor, zy, 0, 255)
        all_equal(ours, graph.run(y, U8, expect="QLinearConv"))


@pytest.mark.parametrize(("one", "other"), [((3, 8), (8, 5)), ((2, 1, 4, 300), (1, 3, 300, 5)), ((4, 8), (2, 8, 5))])
def test_matmul_of_two_activations(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    for _ in range(5):
        a, b, sa, sb = codes(*one), codes(*other), scale(), scale()
        za, zb, zy = zero_point(), zero_point(), zero_point()
        accumulator = arithmetic.matmul(a, za, b, zb)
        sy = accumulator_range(accumulator) * sa * sb
        graph = Graph()
        operands = [graph.dequantized(graph.input(x), s, z) for x, s, z in ((a, sa, za), (b, sb, zb))]
        product = graph.node("MatMul", operands)
        ours = arithmetic.requantize(accumulator, arithmetic.multiplier(sa, sb, sy), zy, 0, 255)
        all_equal(ours, graph.run(graph.quantized(product, sy, zy), U8, expect="QLinearMatMul"))
        del graph.nodes[-1]
        values = arithmetic.dequantize_accumulator(accumulator, sa, sb)
        all_equal(values, graph.run(product, torch.float32, expect="MatMulIntegerToFloat"))


def test_accumulators_beyond_what_float32_holds() -> None:
    """All weights and codes at their largest: accumulators reach 2^29, odd numbers included."""
    inputs = 16384
    x = torch.full((2, inputs), 255, dtype=U8)
    x[1, ::2] = 254
    w = torch.full((3, inputs), 127, dtype=torch.int8)
    w[1:, ::3] = 126
    w[2, 1] = -128
    z, bias = torch.zeros(1, dtype=U8), torch.tensor([-3, -3, 5], dtype=torch.int32)
    accumulator = arithmetic.linear(x, z, w, bias)
    exact = x.long() @ w.long().T + bias
    assert int(exact.abs().max()) > 2**28
    assert torch.equal(accumulator.long(), exact)

    graph = Graph()
    one, zeros = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    y = graph.node(
        "Gemm",
        [
            graph.dequantized(graph.input(x), one, z),
            graph.dequantized(graph.constant(w), one, torch.zeros(1, dtype=torch.int8)),
            graph.dequantized(graph.constant(bias), one, zeros),
        ],
        transB=1,
    )
    all_equal(arithmetic.dequantize_accumulator(accumulator, one, one), graph.run(y, torch.float32, expect="QGemm"))


def test_the_lowest_weights_do_not_fool_the_bound() -> None:
    """|-128| is no int8: a bound computed in int8 would call these sums small."""
    x, z = torch.full((1, 4096), 255, dtype=U8), torch.zeros(1, dtype=U8)
    x[0, 0] = 254
    w = torch.full((1, 4096), -128, dtype=torch.int8)
    w[0, -1] = 127
    assert int(arithmetic.linear(x, z, w)) == int(x.long() @ w.long().T)


def test_an_int32_accumulator_wraps_as_in_the_runtime() -> None:
    x, w = torch.full((1, 70000), 255, dtype=U8), torch.full((1, 70000), 127, dtype=torch.int8)
    z, one = torch.zeros(1, dtype=U8), torch.ones(1)
    graph = Graph()
    operands = [graph.dequantized(graph.input(x), one, z), graph.dequantized(graph.constant(w), one, z.to(torch.int8))]
    y = graph.node("Gemm", operands, transB=1)
    ours = arithmetic.dequantize_accumulator(arithmetic.linear(x, z, w), one, one)
    assert float(ours) < 0
    all_equal(ours, graph.run(y, torch.float32, expect="QGemm"))


def test_linear_accepts_any_number_of_dimensions() -> None:
    x, w, z = codes(2, 3, 4, 20), codes(6, 20, low=-128, high=127, dtype=torch.int8), zero_point()
    flat = arithmetic.linear(x.reshape(-1, 20), z, w)
    assert torch.equal(arithmetic.linear(x, z, w), flat.reshape(2, 3, 4, 6))


def test_autocast_does_not_touch_accumulators() -> None:
    x, w, z = codes(4, 400), codes(8, 400, low=-8, high=7, dtype=torch.int8), zero_point()
    image, kernel = codes(1, 4, 8, 8), codes(8, 4, 3, 3, low=-128, high=127, dtype=torch.int8)
    plain = arithmetic.linear(x, z, w), arithmetic.convolution(image, z, kernel, None, [1, 1], [1, 1], [1, 1], 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = arithmetic.linear(x, z, w), arithmetic.convolution(image, z, kernel, None, [1, 1], [1, 1], [1, 1], 1)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_a_large_bias_saturates_where_the_accumulator_cannot_wrap() -> None:
    bias, sx, sw = torch.tensor([3.0, -3.0, 0.25]), torch.tensor([0.5]), torch.tensor([1e-12, 1e-12, 0.5])
    assert arithmetic.quantize_bias(bias, sx, sw).tolist() == [2**21, -(2**21), 1]
    floor = arithmetic.smallest_weight_scale(bias, sx)
    repaired = arithmetic.quantize_bias(bias, sx, torch.maximum(sw, floor))
    assert torch.allclose(repaired[:2] * (sx * floor[:2]), bias[:2])


def test_concatenate_is_qlinear_concat() -> None:
    for _ in range(10):
        parts = [codes(2, 3, 50), codes(2, 5, 50), codes(2, 1, 50)]
        scales, zero_points = [scale() for _ in parts], [zero_point() for _ in parts]
        sy, zy = random.choice(scales), zero_points[0]
        graph = Graph()
        operands = [graph.dequantized(graph.input(x), s, z) for x, s, z in zip(parts, scales, zero_points, strict=True)]
        y = graph.quantized(graph.node("Concat", operands, axis=1), sy, zy)
        ours = arithmetic.concatenate(parts, scales, zero_points, sy, zy, 1, 0, 255)
        all_equal(ours, graph.run(y, U8, expect="QLinearConcat"))
