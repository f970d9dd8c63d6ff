"""The block view: a tensor in a shape against which its scale broadcasts, and that elementwise work likes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from isogrid.formats import Format, PerTensor
from isogrid.formats.granularity import Granularity, Shape, block_view


@dataclass(frozen=True)
class Blocks:
    """The block view of a tensor: neighbouring dimensions are one that share a scale, or that do not.

    Attributes:
        granularity: of the format.
        shape, scale_shape: of the tensor and of its scale; None where the format has no scale.
        order: the order in which the tensor's dimensions are taken.
        arranged_shape: of the tensor as blocks are cut from it, in that order.
        view: the shape to work in; along its first dimension the work may be cut into pieces.
        scale_view: the shape of the scale that broadcasts against it.

    >>> from isogrid.formats import named_format
    >>> blocks = Blocks.of(torch.zeros(8, 3, 64), named_format("int4/group32"), (8, 3, 2))
    >>> blocks.view, blocks.scale_view
    ((48, 32), (48, 1))
    """

    granularity: Granularity
    shape: Shape
    scale_shape: Shape | None
    order: tuple[int, ...]
    arranged_shape: Shape
    view: Shape
    scale_view: Shape

    @staticmethod
    def of(x: Tensor, fmt: Format, scale_shape: Shape | None) -> "Blocks":
        """The view of a tensor whose scale has this shape; blocks without a scale are as the granularity cuts them."""
        natural = tuple(range(x.dim()))
        if torch.compiler.is_compiling():
            return _blocks(fmt.granularity, tuple(x.shape), scale_shape, natural)
        # Where all share one scale the order of the dimensions is free, and that of the memory is the fastest.
        is_free = isinstance(fmt.granularity, PerTensor) and fmt.grid.dimension == 1
        order = _memory_order(x) if is_free and not x.is_contiguous() else natural
        return _cached_blocks(fmt.granularity, tuple(x.shape), scale_shape, order)

    def cut(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape in the view, detached."""
        arranged = self.granularity.arrange(self._in_order(tensor.detach()))
        return arranged.reshape(self.view)

    def align(self, tensor: Tensor) -> tuple[Tensor, bool]:
        """A tensor of the input's or the scale's shape in the view, and true; any other as it is, and false."""
        if tensor.shape == self.shape:
            return self.cut(tensor), True
        if tensor.shape == self.scale_shape:
            return tensor.detach().reshape(self.scale_view), True
        return tensor.detach(), False

    def join(self, tensor: Tensor) -> Tensor:
        """Back from the view."""
        shape = tuple(self.shape[dim] for dim in self.order)
        restored = self.granularity.restore(tensor.reshape(self.arranged_shape), shape)
        if self.order == tuple(range(len(self.order))):
            return restored
        return restored.permute([self.order.index(dim) for dim in range(len(self.order))])

    def _in_order(self, tensor: Tensor) -> Tensor:
        return tensor if self.order == tuple(range(len(self.order))) else tensor.permute(self.order)


def _blocks(granularity: Granularity, shape: Shape, scale_shape: Shape | None, order: tuple[int, ...]) -> Blocks:
    ordered = torch.empty([shape[dim] for dim in order], device="meta")
    arranged_shape = tuple(granularity.arrange(ordered).shape)
    cut, scale_cut = block_view(arranged_shape, granularity.scale_shape(shape) if scale_shape is None else scale_shape)
    merged: list[tuple[int, int]] = []
    for size, pieces in zip(cut, scale_cut, strict=True):
        if merged and (merged[-1][1] == 1) == (pieces == 1):
            merged[-1] = (merged[-1][0] * size, merged[-1][1] * pieces)
        elif size != 1:
            merged.append((size, pieces))
    if len(merged) == 1 and merged[0][1] == 1 and cut[-1] != merged[0][0]:
        # One scale for all: the rows of the last dimension are as good as any.
        merged = [(merged[0][0] // cut[-1], 1), (cut[-1], 1)]
    merged = merged or [(1, 1)]
    view, scale_view = tuple(size for size, _ in merged), tuple(pieces for _, pieces in merged)
    return Blocks(granularity, shape, scale_shape, order, arranged_shape, view, scale_view)


_cached_blocks: Callable[..., Blocks] = lru_cache(maxsize=1024)(_blocks)


def _memory_order(x: Tensor) -> tuple[int, ...]:
    """The dimensions from the one whose elements lie furthest apart to the one whose elements are neighbours."""
    return tuple(sorted(range(x.dim()), key=x.stride, reverse=True))
