"""Exact sums of products of whole numbers, as the training forward of integer layers needs them."""

from math import ceil

import torch
from torch import Tensor

from isogrid.layers.operations import BilinearOperation, LinearOperation

EXACT_IN_FLOAT32 = 2**24
"""Integers up to here, and sums of products that stay below it, are exact in float32."""

SMALLEST_INTEGER_PRODUCT = 2**24
"""Multiplications from which a matrix product of integers is worth its preparation."""


def accumulate(operation: BilinearOperation, x: Tensor, weight: Tensor, reach: float) -> Tensor:
    """The operation on whole numbers, exact.

    Args:
        operation: linear or convolution.
        x, weight: float tensors that hold whole numbers.
        reach: no product of two of them is larger.

    Returns:
        The operation's output: float32 where that holds every sum, else float64.

    >>> x = torch.full((1, 3), 4096.0)
    >>> accumulate(LinearOperation(), x, torch.tensor([[4096.0, 4096.0, 4096.0]]) + 1, 2**24 + 4096) == 3 * 4096 * 4097
    tensor([[True]])
    """
    pieces = ceil(weight[0].numel() * reach / EXACT_IN_FLOAT32)
    if pieces <= 1:
        return operation.forward(x.to(torch.float32), weight.to(torch.float32), None)
    if reach > EXACT_IN_FLOAT32 or not operation.divides:
        return operation.forward(x.to(torch.float64), weight.to(torch.float64), None)
    # Each part of the sums is exact in float32, and so is the sum of the parts in float64.
    parts = operation.divide(x, weight, pieces)
    total = operation.forward(*parts[0], None).to(torch.float64)
    for x_part, weight_part in parts[1:]:
        total += operation.forward(x_part, weight_part, None)
    return total


def integer_product_pays(operation: BilinearOperation, x: Tensor, weight: Tensor) -> bool:
    """Whether a matrix product of 8-bit integers is faster here than one of floats that hold the same integers."""
    if not isinstance(operation, LinearOperation) or x.numel() * len(weight) < SMALLEST_INTEGER_PRODUCT:
        return False
    if x.device.type == "cpu":
        return torch.cpu._is_vnni_supported()
    rows = x.numel() // x.shape[-1]
    return x.device.type == "cuda" and rows > 16 and not (weight.shape[0] % 8 or weight.shape[1] % 8)


def multiply_integers(x_codes: Tensor, zero_point: Tensor | None, weight_codes: Tensor) -> Tensor:
    """`(x codes - zero point) @ weight codes.T` by the processor's integer instructions, exact.

    Args:
        x_codes: int8 or uint8 [..., in].
        zero_point: of x, one element, any dtype.
        weight_codes: int8 [out, in].

    Returns:
        int32 [..., out].

    >>> x, weight = torch.tensor([[255, 0]], dtype=torch.uint8), torch.tensor([[-128, 1]], dtype=torch.int8)
    >>> multiply_integers(x, torch.tensor([1.0]), weight)
    tensor([[-32513]], dtype=torch.int32)
    """
    zero = x_codes.new_zeros(1, dtype=torch.int32) if zero_point is None else zero_point.to(torch.int32)
    if x_codes.dtype == torch.uint8:
        # The same byte with its first bit flipped, read as int8, is the code minus 128.
        x_codes, zero = (x_codes ^ 128).view(torch.int8), zero - 128
    product = torch._int_mm(x_codes.reshape(-1, x_codes.shape[-1]), weight_codes.T)
    product -= zero * weight_codes.sum(1, dtype=torch.int32)
    return product.reshape(*x_codes.shape[:-1], len(weight_codes))
