"""Granularity: which elements of a tensor share a scale. One idea, the block shape.

A granularity maps a tensor's shape to the shape of its scale. The scale has the tensor's rank, and each of its
dimensions divides the tensor's: `shape[i] // scale_shape[i]` neighbours share one scale along dimension i.
"""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from isogrid.errors import FormatError

Shape = tuple[int, ...]


class Granularity(Protocol):
    """What every granularity offers."""

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scale for a tensor of this shape; raises FormatError where the blocks do not fit."""
        ...

    def arrange(self, x: Tensor) -> Tensor:
        """The tensor as the blocks are cut from it: itself, or padded or flattened."""
        ...

    def restore(self, arranged: Tensor, shape: Shape) -> Tensor:
        """Undo `arrange`."""
        ...


class _Plain:
    """Blocks are cut from the tensor as it is."""

    def arrange(self, x: Tensor) -> Tensor:
        return x

    def restore(self, arranged: Tensor, shape: Shape) -> Tensor:
        return arranged


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor.

    >>> PerTensor().scale_shape((4, 6))
    (1, 1)
    """

    def scale_shape(self, shape: Shape) -> Shape:
        return (1,) * max(1, len(shape))

    def arrange(self, x: Tensor) -> Tensor:
        return x if x.dim() else x.reshape(1)

    def restore(self, arranged: Tensor, shape: Shape) -> Tensor:
        return arranged.reshape(shape)

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel(_Plain):
    """One scale for each index of one axis, the output channels of a weight by default.

    >>> PerChannel().scale_shape((4, 6))
    (4, 1)
    """

    axis: int = 0

    def scale_shape(self, shape: Shape) -> Shape:
        if not -len(shape) <= self.axis < len(shape):
            raise FormatError(
                f"Channel granularity on axis {self.axis} needs such an axis; the shape is {list(shape)}."
            )
        axis = self.axis % len(shape)
        return tuple(size if i == axis else 1 for i, size in enumerate(shape))

    def __str__(self) -> str:
        return "channel" if self.axis == 0 else f"channel{self.axis}"


@dataclass(frozen=True)
class PerHead(_Plain):
    """One scale for each head of queries, keys or values [..., heads, tokens, size], for all tokens.

    >>> PerHead().scale_shape((2, 8, 5, 64))
    (1, 8, 1, 1)
    """

    def scale_shape(self, shape: Shape) -> Shape:
        if len(shape) < 3:
            raise FormatError(f"Head granularity needs [heads, tokens, size]; the shape is {list(shape)}.")
        return tuple(size if i == len(shape) - 3 else 1 for i, size in enumerate(shape))

    def __str__(self) -> str:
        return "head"


@dataclass(frozen=True)
class PerToken(_Plain):
    """One scale for each vector along the last dimension.

    >>> PerToken().scale_shape((2, 5, 16))
    (2, 5, 1)
    """

    def scale_shape(self, shape: Shape) -> Shape:
        if not shape:
            raise FormatError("Token granularity needs at least one dimension.")
        return (*shape[:-1], 1)

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` values of the last dimension, or of another.

    Args:
        size: values in a group.
        pads: fill the last group up with zeros instead of refusing a dimension that `size` does not divide.
        axis: the dimension that is cut into groups.

    >>> PerGroup(32).scale_shape((8, 128))
    (8, 4)
    >>> PerGroup(32, axis=0).scale_shape((128, 8))
    (4, 8)
    >>> PerGroup(32).scale_shape((8, 50))
    Traceback (most recent call last):
    isogrid.errors.FormatError: a group of 32 does not divide the last dimension, 50. Groups that do: 2, 5, 10, 25, 50.
    """

    size: int
    pads: bool = False
    axis: int = -1

    def __post_init__(self) -> None:
        _check_size(self.size)

    def scale_shape(self, shape: Shape) -> Shape:
        if not shape:
            raise FormatError("Group granularity needs at least one dimension.")
        if not -len(shape) <= self.axis < len(shape):
            raise FormatError(f"Groups on axis {self.axis} need such an axis; the shape is {list(shape)}.")
        axis = self.axis % len(shape)
        length = shape[axis]
        if length % self.size and not self.pads:
            fitting = ", ".join(str(n) for n in range(2, length + 1) if length % n == 0) or "none but 1"
            which = "the last dimension" if self.axis == -1 else f"dimension {self.axis}"
            raise FormatError(f"a group of {self.size} does not divide {which}, {length}. Groups that do: {fitting}.")
        return (*shape[:axis], -(-length // self.size), *shape[axis + 1 :])

    def arrange(self, x: Tensor) -> Tensor:
        missing = -x.shape[self.axis] % self.size
        # F.pad counts dimensions from the last.
        return F.pad(x, (0, 0) * (-1 - self._from_last(x.dim())) + (0, missing)) if missing else x

    def restore(self, arranged: Tensor, shape: Shape) -> Tensor:
        length = shape[self.axis]
        return arranged if arranged.shape[self.axis] == length else arranged.narrow(self.axis, 0, length)

    def _from_last(self, dimensions: int) -> int:
        """The axis as a negative number."""
        return self.axis % dimensions - dimensions

    def __str__(self) -> str:
        return f"group{self.size}" + ("" if self.axis == -1 else f":axis={self.axis}")


@dataclass(frozen=True)
class PerFlatGroup:
    """One scale for each run of `size` values of the flattened tensor, the last run padded with zeros.

    bitsandbytes groups the scales of its double quantisation so.

    >>> PerFlatGroup(256).scale_shape((8, 100))
    (4,)
    """

    size: int

    def __post_init__(self) -> None:
        _check_size(self.size)

    def scale_shape(self, shape: Shape) -> Shape:
        return (-(-prod(shape) // self.size),)

    def arrange(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        return F.pad(flat, (0, -len(flat) % self.size))

    def restore(self, arranged: Tensor, shape: Shape) -> Tensor:
        return arranged[: prod(shape)].reshape(shape)

    def __str__(self) -> str:
        return f"flat{self.size}"


@dataclass(frozen=True)
class PerTile(_Plain):
    """One scale for each tile of `rows` x `columns` of the last two dimensions.

    >>> PerTile(16, 16).scale_shape((64, 32))
    (4, 2)
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        _check_size(min(self.rows, self.columns))

    def scale_shape(self, shape: Shape) -> Shape:
        if len(shape) < 2 or shape[-2] % self.rows or shape[-1] % self.columns:
            raise FormatError(
                f"tiles of {self.rows}x{self.columns} do not divide the shape {list(shape)}. "
                "Both of its last two dimensions must be multiples of the tile's."
            )
        return (*shape[:-2], shape[-2] // self.rows, shape[-1] // self.columns)

    def __str__(self) -> str:
        return f"tile{self.rows}x{self.columns}"


def _check_size(size: int) -> None:
    if size < 1:
        raise FormatError(f"A block has at least one value, not {size}.")


def block_view(shape: Shape, scale_shape: Shape) -> tuple[Shape, Shape]:
    """View shapes that let a scale broadcast against the tensor it belongs to.

    A dimension that the scale cuts into pieces becomes two, (pieces, piece); the others stay as they are.
    A scale of lower rank than the tensor is aligned to the right, as in broadcasting.

    Args:
        shape: of the tensor.
        scale_shape: of the scale, each dimension dividing the tensor's.

    >>> block_view((8, 128), (8, 4))
    ((8, 4, 32), (8, 4, 1))
    >>> block_view((8, 3, 3, 3), (8, 1, 1, 1))
    ((8, 3, 3, 3), (8, 1, 1, 1))
    """
    tensor_view: list[int] = []
    scale_view: list[int] = []
    padded = (1,) * (len(shape) - len(scale_shape)) + tuple(scale_shape)
    for size, pieces in zip(shape, padded[len(padded) - len(shape) :], strict=True):
        if pieces in (1, size):
            tensor_view.append(size)
            scale_view.append(pieces)
        else:
            if pieces == 0 or size % pieces:
                raise FormatError(f"A scale of shape {list(scale_shape)} does not fit a tensor of shape {list(shape)}.")
            tensor_view += [pieces, size // pieces]
            scale_view += [pieces, 1]
    return tuple(tensor_view), tuple(scale_view)


def blocks(x: Tensor, scale_shape: Shape) -> Tensor:
    """The values of each block as a row.

    Args:
        x: tensor [...].
        scale_shape: one entry a block; of the tensor's rank.

    Returns:
        [number of blocks, values in a block]; rows in the order of the flattened scale.

    >>> import torch
    >>> blocks(torch.arange(8).reshape(2, 4), (1, 2))
    tensor([[0, 1, 4, 5],
            [2, 3, 6, 7]])
    """
    pairs = [(pieces, size // max(1, pieces)) for size, pieces in zip(x.shape, scale_shape, strict=True)]
    split = x.reshape([n for pair in pairs for n in pair])
    order = list(range(0, split.dim(), 2)) + list(range(1, split.dim(), 2))
    return split.permute(order).reshape(prod(scale_shape), prod([piece for _, piece in pairs]))
