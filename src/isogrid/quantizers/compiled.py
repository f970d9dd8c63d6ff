"""Compiled kernels for the elementwise work, in an otherwise eager model too.

A fake quantiser is a chain of cheap elementwise steps. Run one by one each step reads and writes the whole tensor;
compiled they are one pass. Small tensors are not worth a compilation, and where there is no compiler the
plain functions run: same arithmetic, same bits.
"""

import logging
import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SMALLEST_COMPILED = 2**18
"""Elements from which a tensor is worth a compiled kernel."""


def kernel(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """The function to call for work on x: compiled where x is large and a compiler is there, else itself.

    Args:
        function: pure and elementwise over x.
        x: the tensor it will read.

    >>> kernel(torch.relu, torch.zeros(4)) is torch.relu
    True
    """
    if torch.compiler.is_compiling() or x.numel() < SMALLEST_COMPILED or not compiler_is_available():
        return function
    return _compile(function)


@lru_cache(maxsize=1)
def compiler_is_available() -> bool:
    """Whether torch.compile can build CPU kernels here; said once in the log where it cannot."""
    available = any(shutil.which(name) for name in ("g++", "clang++", "cl"))
    if not available:
        logger.warning("No C++ compiler found: quantisers run as plain PyTorch, slower but with the same results.")
    return available


@lru_cache(maxsize=64)
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)
