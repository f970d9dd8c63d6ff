"""How the elementwise work runs: as one compiled kernel, or piece by piece.

A fake quantiser is a chain of cheap elementwise steps. Run one by one over a large tensor, each step reads and writes
all of it. Compiled they are one pass, in an otherwise eager model too. Where there is no compiler the same functions
run piece by piece: same arithmetic, same values, and no temporary of the tensor's size either way. Sums over the
tensor, the gradients of scales, are added up in another order and may differ in the last bits.
"""

import importlib.util
import logging
import shutil
from collections.abc import Callable, Hashable
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_any_mode_without_ignore_compile_internals

logger = logging.getLogger(__name__)

SMALLEST_COMPILED = 2**18
"""Elements from which a tensor is worth a compiled kernel."""

PIECE = 2**21
"""Elements of a piece on the CPU: so many that the calls cost nothing, and few beside the weight of a large model."""

Tensors = tuple[Tensor | None, ...]


class Results(NamedTuple):
    """What an elementwise function returns.

    Attributes:
        rows: as long as the inputs of that name; results for pieces are joined.
        whole: as long as the inputs of that name; results for pieces are added up.
    """

    rows: Tensors
    whole: Tensors = ()


Elementwise = Callable[[Any, tuple[Tensor, ...], Tensors], Results]
"""A pure function of something fixed and hashable, of tensors that share their first dimension, and of others."""


def run(function: Elementwise, fixed: Hashable, rows: tuple[Tensor, ...], whole: Tensors = ()) -> Results:
    """`function(fixed, rows, whole)`: compiled where the tensors are large and a compiler is there, else in pieces.

    Args:
        function: elementwise over `rows`; what it computes for some rows does not depend on the others, but for sums.
        fixed: what it is compiled for, besides dtypes.
        rows: tensors with the same first dimension, the first of them the largest.
        whole: tensors that every piece needs.

    >>> def double(factor, rows, whole):
    ...     return Results((rows[0] * factor,), (rows[0].sum(0),))
    >>> run(double, 2, (torch.ones(3, 2),))
    Results(rows=(tensor([[2., 2.],
            [2., 2.],
            [2., 2.]]),), whole=(tensor([3., 3.]),))
    """
    if torch.compiler.is_compiling():
        return function(fixed, rows, whole)
    # torch.compile skips what runs under a dispatch mode, such as the one by which verification looks on.
    looked_at = is_in_any_mode_without_ignore_compile_internals()
    if looked_at or rows[0].numel() < SMALLEST_COMPILED or not compiler_is_available(rows[0].device.type):
        return in_pieces(function, fixed, rows, whole)
    return _kernel(function, fixed)(rows, whole)


def in_pieces(function: Elementwise, fixed: Hashable, rows: tuple[Tensor, ...], whole: Tensors) -> Results:
    """What `run` does without a compiler."""
    count = len(rows[0])
    step = max(1, PIECE // max(1, rows[0].numel() // max(1, count)))
    if step >= count or rows[0].device.type != "cpu":
        return function(fixed, rows, whole)
    joined: list[Tensor | None] = []
    added: list[Tensor | None] = []
    for start in range(0, count, step):
        piece = function(fixed, tuple(tensor[start : start + step] for tensor in rows), whole)
        if not start:
            joined = [None if t is None else t.new_empty((count, *t.shape[1:])) for t in piece.rows]
            added = list(piece.whole)
        else:
            added = [
                t if total is None or t is None else total + t for total, t in zip(added, piece.whole, strict=True)
            ]
        for target, tensor in zip(joined, piece.rows, strict=True):
            if target is not None and tensor is not None:
                target[start : start + step] = tensor
    return Results(tuple(joined), tuple(added))


@lru_cache(maxsize=4)
def compiler_is_available(device: str) -> bool:
    """Whether torch.compile can build kernels for a device here; said once in the log where it cannot."""
    if device == "cpu":
        available = any(shutil.which(name) for name in ("g++", "clang++", "cl"))
    else:
        available = importlib.util.find_spec("triton") is not None
    if not available:
        _say_plain(f"No compiler for kernels on {device} was found")
    return available


class _Kernel:
    """A function compiled for one fixed argument, and plain from the first time that fails."""

    def __init__(self, function: Elementwise, fixed: Hashable):
        self._function, self._fixed, self._is_ready = function, fixed, False
        # What torch.compile has compiled hangs on the code object, a limited number of times: each kernel has its own.
        code = FunctionType(
            function.__code__.replace(),
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        self._compiled: Callable[..., Results] | None = torch.compile(code, fullgraph=True)

    def __call__(self, rows: tuple[Tensor, ...], whole: Tensors) -> Results:
        if self._compiled is not None:
            # Detached, a view no longer refers to its base, to whose shape the kernel would otherwise be bound.
            rows = tuple([tensor.detach() for tensor in rows])
            whole = tuple([None if tensor is None else tensor.detach() for tensor in whole])
            if not self._is_ready:
                # One kernel shall serve tensors of all sizes.
                for tensor in rows:
                    torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.dim())))
                self._is_ready = True
            try:
                # Function modes around are none of a kernel's business, and would have it compiled once more.
                with torch._C.DisableTorchFunction():
                    return self._compiled(self._fixed, rows, whole)
            except Exception as error:
                # What is wrong with the function itself the plain call below raises again.
                self._compiled = None
                _say_plain(
                    f"A kernel could not be compiled ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
                )
        return in_pieces(self._function, self._fixed, rows, whole)


@lru_cache(maxsize=256)
def _kernel(function: Elementwise, fixed: Hashable) -> _Kernel:
    return _Kernel(function, fixed)


@lru_cache(maxsize=1)
def _say_plain(why: str) -> None:
    logger.warning("%s: quantisers run as plain PyTorch, slower but with the same values.", why)
