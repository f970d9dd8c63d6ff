"""Streaming statistics of queries, keys and values, for ranges that hold for a head."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.formats import Affine, Format, PerTensor
from isogrid.quantizers.observer import Observer, synchronize
from isogrid.quantizers.ranges import Range


class HeadObserver(nn.Module):
    """An observer for each head of tensors [batch, heads, tokens, size].

    >>> from isogrid.formats import named_format
    >>> from isogrid.quantizers.ranges import AbsMax
    >>> observer = HeadObserver(2, AbsMax())
    >>> observer.observe(torch.tensor([[[[127.0]], [[-254.0]]]]))
    >>> observer.affine(named_format("int8/head:narrow"), AbsMax()).scale
    tensor([1., 2.])
    """

    def __init__(self, heads: int, range: Range):
        super().__init__()
        self.of_head = nn.ModuleList(Observer.for_range(range) for _ in [range] * heads)

    def reset(self) -> None:
        """Forget everything."""
        for observer in self._observers():
            observer.reset()

    def observe(self, x: Tensor) -> None:
        """Take in a tensor [batch, heads, tokens, size]."""
        for observer, values in zip(self._observers(), x.unbind(-3), strict=True):
            observer.observe(values)

    def affine(self, fmt: Format, range: Range) -> Affine:
        """The parameters that a range chooses for each head: float32 [heads]."""
        whole = replace(fmt, granularity=PerTensor())
        found = [observer.affine(whole, range) for observer in self._observers()]
        return Affine(*[None if part[0] is None else torch.cat(part) for part in zip(*found, strict=True)])

    def synchronize(self, group: Any = None) -> None:
        """Let all ranks have seen what each of them saw."""
        synchronize(self._observers(), group)

    def _observers(self) -> list[Observer]:
        return [observer for observer in self.of_head if isinstance(observer, Observer)]
