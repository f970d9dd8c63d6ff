"""The operators are well-formed: their schemas hold, and their fake versions say the shapes and dtypes they return."""

import pytest
import torch
from torch import Tensor

from isogrid.layers import arithmetic, kernel_operators, nbits, operators

ONE = torch.tensor([0.5])
ZERO = torch.tensor([3], dtype=torch.uint8)
GRID = (ONE, ZERO)
Y = (ONE, ZERO, 0, 255)


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, dtype=dtype)


WEIGHT = codes(6, 20, dtype=torch.int8)
SCALES = torch.rand(6)
BIAS = torch.arange(6, dtype=torch.int32)
KERNEL = codes(6, 2, 3, 2, dtype=torch.int8)

CASES = {
    "quantize": (torch.randn(2, 3, 4), *GRID, 0, 255),
    "dequantize": (codes(2, 3), *GRID),
    "static_linear": (codes(2, 3, 20), *GRID, WEIGHT, SCALES, BIAS, *Y),
    "static_linear_float": (codes(2, 20), *GRID, WEIGHT, SCALES, None),
    "static_convolution": (
        *(codes(2, 4, 9, 8), *GRID, KERNEL, SCALES, BIAS),
        *(ONE, ZERO, [2, 1], [1, 0], [1, 2], 2, 0, 255),
    ),
    "static_convolution_float": (
        *(codes(2, 4, 9, 8), *GRID, KERNEL, SCALES, BIAS),
        *([2, 1], [1, 0], [1, 2], 2),
    ),
    "static_add": (codes(2, 3, 4), *GRID, codes(1, 3, 1), *GRID, *Y, "onnxruntime"),
    "static_multiply": (codes(2, 3, 4), *GRID, codes(5, 1, 1, 4), *GRID, *Y, "onnxruntime"),
    "static_matmul": (codes(2, 3, 4), *GRID, codes(4, 5), *GRID, *Y),
    "static_matmul_float": (codes(2, 1, 3, 4), *GRID, codes(5, 4, 2), *GRID),
    "static_global_average_pool": (codes(2, 3, 4, 5), *GRID, *Y, "onnxruntime"),
    "static_average_pool": (
        *(codes(2, 3, 9, 8), *GRID),
        *(ONE, ZERO, [3, 2], [2, 2], [1, 0], True, False, 0, 255, "onnxruntime"),
    ),
    "static_activation": (codes(2, 3, 4), *GRID, SCALES[:3], ONE, ZERO, "prelu", [], 0, 255, "onnxruntime"),
    "static_concatenate": ([codes(2, 3), codes(2, 4)], [ONE, ONE * 2], [ZERO, ZERO], ONE, ZERO, 1, 0, 255),
    "matmul_nbits": (
        *(torch.randn(2, 3, 64), nbits.pack_matmul_nbits(codes(6, 64) // 16, 4, 32)),
        *(torch.rand(6, 2), None, torch.randn(6), 4, 32, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operator_is_well_formed(name: str) -> None:
    operator = getattr(torch.ops.isogrid, name).default
    torch.library.opcheck(operator, CASES[name], test_utils=("test_schema", "test_faketensor"))


def test_every_operator_is_here() -> None:
    defined = vars(operators) | vars(kernel_operators)
    assert set(CASES) == {name for name, value in defined.items() if hasattr(value, "register_fake")}


def test_asymmetric_padding_has_the_shape_it_says() -> None:
    window = ([1, 1], [0, 1, 2, 0], [1, 1], 2, 0, 255)
    x = codes(2, 4, 9, 8)
    y = torch.ops.isogrid.static_convolution(x, *GRID, KERNEL, SCALES, None, ONE, ZERO, *window)
    accumulator = arithmetic.convolution(x, ZERO, KERNEL, None, *window[:4])
    assert y.shape == accumulator.shape == (2, 6, 9, 8)
    torch.library.opcheck(
        torch.ops.isogrid.static_convolution.default,
        (x, *GRID, KERNEL, SCALES, None, ONE, ZERO, *window),
        test_utils="test_faketensor",
    )
