"""What runtimes do not agree on, against ONNX Runtime itself: equal in every code."""

import random

import pytest
import torch

from isogrid.errors import TargetError
from isogrid.layers.kernels import KERNELS
from isogrid.layers.windows import mean_of_windows
from tests.layers.codes import U8, all_equal, codes, every_pair, scale, zero_point
from tests.layers.runtime import Graph

KERNEL = KERNELS["onnxruntime"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.mark.parametrize("tie_prone", [True, False])
def test_add_is_qlinear_add(tie_prone: bool) -> None:
    a, b = every_pair()
    for _ in range(15):
        sa, za, zb, zy = scale(), zero_point(), zero_point(), zero_point()
        sb = sa * random.choice([0.5, 1, 1.5, 2, 3]) if tie_prone else scale()
        sy = sa * random.choice([1, 1.5, 2, 3, 4]) if tie_prone else scale() * 4
        graph = Graph()
        operands = [graph.dequantized(graph.input(a), sa, za), graph.dequantized(graph.input(b), sb, zb)]
        y = graph.quantized(graph.node("Add", operands), sy, zy)
        all_equal(KERNEL.add(a, sa, za, b, sb, zb, sy, zy, 0, 255), graph.run(y, U8, expect="QLinearAdd"))


def test_add_followed_by_relu() -> None:
    a, b = every_pair()
    for _ in range(5):
        sa, sb, sy, za, zb = scale(), scale(), scale() * 2, zero_point(), zero_point()
        zy = torch.zeros(1, dtype=U8)
        graph = Graph()
        operands = [graph.dequantized(graph.input(a), sa, za), graph.dequantized(graph.input(b), sb, zb)]
        y = graph.quantized(graph.node("Relu", [graph.node("Add", operands)]), sy, zy)
        all_equal(KERNEL.add(a, sa, za, b, sb, zb, sy, zy, 0, 255), graph.run(y, U8, expect="QLinearAdd"))


@pytest.mark.parametrize(("one", "other"), [
    ((2, 4, 8, 9), (1, 1, 1, 1)), ((2, 4, 8, 9), (1, 4, 1, 1)), ((2, 4, 8, 9), (1, 1, 8, 9)),
    ((2, 4, 1, 9), (2, 4, 8, 9)), ((4, 1, 7), (1, 5, 7)), ((4, 1, 7), (1, 5, 1)), ((2, 3, 1), (2, 1, 1)),
])  # fmt: skip
def test_sums_and_products_broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    for _ in range(5):
        a, b, sa, za, zb, zy = codes(*one), codes(*other), scale(), zero_point(), zero_point(), zero_point()
        sb, sy = sa * random.choice([0.5, 1, 3]), sa * random.choice([1, 2, 3])
        for name, op in (("Add", KERNEL.add), ("Mul", KERNEL.multiply)):
            graph = Graph()
            operands = [graph.dequantized(graph.input(a), sa, za), graph.dequantized(graph.input(b), sb, zb)]
            y = graph.quantized(graph.node(name, operands), sy, zy)
            all_equal(op(a, sa, za, b, sb, zb, sy, zy, 0, 255), graph.run(y, U8, expect=f"QLinear{name}"))


def test_multiply_is_qlinear_mul() -> None:
    a, b = every_pair()
    for _ in range(15):
        sa, sb, za, zb, zy = scale(), scale(), zero_point(), zero_point(), zero_point()
        sy = sa * sb * random.choice([16, 64, 100, 256])
        graph = Graph()
        operands = [graph.dequantized(graph.input(a), sa, za), graph.dequantized(graph.input(b), sb, zb)]
        y = graph.quantized(graph.node("Mul", operands), sy, zy)
        ours = KERNEL.multiply(a, sa, za, b, sb, zb, sy, zy, 0, 255)
        all_equal(ours, graph.run(y, U8, expect="QLinearMul"))


def test_global_average_pool() -> None:
    for channels, height, width in [(1, 1, 1), (3, 2, 5), (16, 7, 7), (20, 11, 3), (8, 64, 64)]:
        for _ in range(6):
            x, sx, zx, zy = codes(2, channels, height, width), scale(), zero_point(), zero_point()
            sy = sx * random.choice([0.25, 0.5, 1, 1.25])
            graph = Graph()
            y = graph.quantized(graph.node("GlobalAveragePool", [graph.dequantized(graph.input(x), sx, zx)]), sy, zy)
            ours = KERNEL.global_average_pool(x, sx, zx, sy, zy, 0, 255)
            all_equal(ours, graph.run(y, U8, expect="QLinearGlobalAveragePool"))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_average_pool(rank: int, count_include_pad: bool, ceil_mode: bool) -> None:
    for _ in range(12):
        space = [random.randint(5, 11) for _ in range(rank)]
        kernel = [random.randint(1, 4) for _ in range(rank)]
        stride = [random.randint(1, 3) for _ in range(rank)]
        padding = [random.randint(0, k // 2) for k in kernel]
        if ceil_mode and count_include_pad:
            padding = [0] * rank
        x, sx, zx, zy = codes(2, 3, *space), scale(), zero_point(), zero_point()
        sy = sx * random.choice([0.5, 1, 1.25])
        graph = Graph()
        y = graph.node(
            "AveragePool",
            [graph.dequantized(graph.input(x), sx, zx)],
            kernel_shape=kernel,
            strides=stride,
            pads=padding * 2,
            ceil_mode=int(ceil_mode),
            count_include_pad=int(count_include_pad and any(padding)),
        )
        y = graph.quantized(y, sy, zy)
        window = (kernel, stride, padding, ceil_mode, count_include_pad)
        ours = KERNEL.average_pool(x, sx, zx, sy, zy, *window, 0, 255)
        all_equal(ours, graph.run(y, U8, expect="QLinearAveragePool"))


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_average_pool_averages_what_torch_averages(ceil_mode: bool) -> None:
    x = torch.randn(2, 3, 11, 8)
    for kernel, stride, padding in [((3, 2), (2, 2), (1, 0)), ((2, 2), (2, 3), (0, 0)), ((4, 4), (3, 3), (2, 1))]:
        for include in (True, False):
            if ceil_mode and include and any(padding):
                continue
            theirs = torch.nn.functional.avg_pool2d(x, kernel, stride, padding, ceil_mode, include)
            ours = mean_of_windows(x, kernel, stride, padding, ceil_mode, include)
            torch.testing.assert_close(ours, theirs)


def test_average_pool_refuses_what_onnx_counts_differently() -> None:
    x, one, z = codes(1, 1, 5, 5), torch.ones(1), torch.zeros(1, dtype=U8)
    with pytest.raises(TargetError, match="count_include_pad=False"):
        KERNEL.average_pool(x, one, z, one, z, [2, 2], [2, 2], [1, 1], True, True, 0, 255)
