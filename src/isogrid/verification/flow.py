"""Where values go: what the outputs depend on, and what is computed more than once."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Flow:
    """Follows marks from tensor to tensor through the operations of one run, and numbers what they compute.

    A mark passes from whatever an operation reads to all that it makes or changes. Tensors that share memory share
    their marks, so that a mark may reach too far, never too short.
    """

    def __init__(self) -> None:
        self._marks: dict[int, int] = {}  # bits, by storage
        self._count = 0
        self._into_python = 0
        self._numbers: dict[tuple[int, int], int] = {}  # by tensor and version
        self._computations: dict[Any, int] = {}
        self._alive: list[Tensor] = []  # keeps Python from giving an id to another tensor

    def mark(self, tensors: Iterable[Tensor]) -> int:
        """Put a new mark on tensors; returns its bit."""
        bit = 1 << self._count
        self._count += 1
        for x in tensors:
            self._add(x, bit)
        return bit

    def reaching(self, outputs: Iterable[Tensor]) -> int:
        """The marks on tensors, and those of values that became Python numbers: these may decide anything."""
        found = self._into_python
        for x in outputs:
            found |= self._marks.get(_storage(x), 0)
        return found

    def number(self, x: Tensor) -> int:
        """Equal for tensors that the same operations make of the same values."""
        key = (id(x), x._version)
        if key not in self._numbers:
            self._alive.append(x)
            contents = x.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            self._set(key, (str(x.dtype), tuple(x.shape), hashlib.sha256(contents).digest()))
        return self._numbers[key]

    def before(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """What an operation computes, as far as its name and operands say; to be asked before it changes them."""
        leaves = tree_leaves((args, kwargs))
        return (func, *(self.number(x) if isinstance(x, Tensor) else repr(x) for x in leaves))

    def after(self, computation: tuple[Any, ...], func: Any, operands: list[Tensor], results: list[Tensor]) -> None:
        """An operation has run."""
        bits = self.reaching(operands) & ~self._into_python
        changed = operands if func._schema.is_mutable else []
        if not results and not changed:
            self._into_python |= bits
        for x in (*results, *changed):
            self._add(x, bits)
        for index, x in enumerate(results):
            self._alive.append(x)
            self._set((id(x), x._version), (*computation, index))

    def _set(self, key: tuple[int, int], computation: Any) -> None:
        self._numbers[key] = self._computations.setdefault(computation, len(self._computations))

    def _add(self, x: Tensor, bits: int) -> None:
        if bits:
            self._alive.append(x)
            self._marks[_storage(x)] = self._marks.get(_storage(x), 0) | bits


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)
