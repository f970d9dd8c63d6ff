"""Functions of two bytes as tables."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PAIRS = 2**16
"""How many pairs of bytes there are."""


def of_two_codes(function: Callable[..., Tensor], a: tuple[Any, ...], b: tuple[Any, ...], *rest: Any) -> Tensor:
    """`function(*a, *b, *rest)`, elementwise in two tensors of codes; beyond 65,536 values by a table of all pairs.

    Args:
        function: elementwise in the first of `a` and the first of `b`; what else it takes is the same for all values.
        a, b: codes, int8 or uint8, which broadcast against each other, and what goes with them.
        rest: further arguments.

    >>> codes = torch.randint(0, 256, (70_000,), dtype=torch.uint8)
    >>> torch.equal(of_two_codes(torch.bitwise_xor, (codes,), (codes.flip(0),)), codes ^ codes.flip(0))
    True
    """
    (a_codes, *a_rest), (b_codes, *b_rest) = a, b
    if max(a_codes.numel(), b_codes.numel()) <= PAIRS:
        return function(*a, *b, *rest)
    bytes_ = torch.arange(256, device=a_codes.device).to(torch.uint8)
    first, second = bytes_.view(a_codes.dtype)[:, None], bytes_.view(b_codes.dtype)[None, :]
    table = function(first, *a_rest, second, *b_rest, *rest).reshape(-1)
    index = a_codes.view(torch.uint8).to(torch.int32) * 256 + b_codes.view(torch.uint8)
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)
