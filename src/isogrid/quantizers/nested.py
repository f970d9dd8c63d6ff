"""The search for scales and offsets that share a scale of their own: the K-quants' second step.

Scales that are found one by one, each the best for its block, are rounded to a few bits of the largest among them.
What is best then depends on the neighbours: the shared scale is a compromise, and a scale and an offset that were
rounded the wrong way do better a step further. As ggml's quantisers do (`make_qkx2_quants` in ggml-quants.c), this
looks again; unlike theirs it weighs all values alike, and always through the format's own arithmetic.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isogrid.formats import Affine, Format, IntegerGrid, PerGroup
from isogrid.formats.granularity import blocks
from isogrid.quantizers.fitting import combine

SHARED_FACTORS = (0.8, 0.85, 0.9, 0.94, 0.97, 1.03, 1.06, 1.1)
"""Tried on the largest scale of a super-block, which the shared scale follows."""

STEPS = (-2, -1, 1, 2)
"""Tried on the code of each scale and of each offset."""

ROUNDS = 2
PIECE = 2**20
"""Values worked on at once."""


def is_nested(fmt: Format) -> bool:
    """Whether integer scales of groups share a scale by groups themselves, as in all K-quants."""
    storage = fmt.scale
    return (
        isinstance(fmt.granularity, PerGroup)
        and storage is not None
        and isinstance(storage.grid, IntegerGrid)
        and isinstance(storage.granularity, PerGroup)
        and storage.scale is not None
    )


def refined(x: Tensor, fmt: Format, affine: Affine) -> Affine:
    """Parameters with no more squared error than the given ones, once they are stored.

    Args:
        x: float32 [..., K].
        fmt: nested.
        affine: before storage, in the format's scale shape.

    Returns:
        Parameters that storage keeps as they are, in the same shape.
    """
    assert affine.scale is not None
    rows, shape = x.reshape(-1, x.shape[-1]), affine.scale.shape
    flat = affine.reshape((len(rows), -1))
    count = max(1, PIECE // rows.shape[1])
    found = []
    for start in range(0, len(rows), count):
        some = slice(start, start + count)
        part = Affine(*[None if t is None else t[some] for t in flat])
        found.append(_Refinement(rows[some], fmt, part).run())
    whole = [None if pieces[0] is None else torch.cat(pieces) for pieces in zip(*found, strict=True)]
    return Affine(*whole).reshape(tuple(shape))


class _Refinement:
    """Coordinate descent over the shared scales, then over the codes on them; every step is kept where it helps."""

    def __init__(self, x: Tensor, fmt: Format, affine: Affine):
        self.x, self.format = x, fmt
        self.names = ("scale",) if fmt.offset is None else ("scale", "offset")
        self.start, self.best = affine, fmt.stored(affine)
        self.least = self.errors(self.best)

    def run(self) -> Affine:
        """The best parameters, as stored."""
        for name in self.names:
            self.attempt_all(self.shared(name), per_super_block=True)
        for _ in range(ROUNDS):
            for name in self.names:
                self.attempt_all(self.stepped(name), per_super_block=False)
        return self.best

    def shared(self, name: str) -> Iterator[Affine]:
        """Parameters in which the largest magnitude of each super-block is another one."""
        values: Tensor = getattr(self.start, name)
        grouped = values.unflatten(-1, (-1, self.per(name)))  # type: ignore[no-untyped-call]
        largest = grouped.abs().amax(-1, keepdim=True)
        for factor in SHARED_FACTORS:
            end = largest * factor
            moved = torch.where(grouped.abs() == largest, grouped.sign() * end, grouped.clamp(-end, end))
            yield self.format.stored(self.best._replace(**{name: moved.flatten(-2)}))

    def stepped(self, name: str) -> Iterator[Affine]:
        """Parameters some codes away, but for the largest of each super-block; no scale becomes zero."""
        part: Any = getattr(self.format, name)
        for step in STEPS:
            values: Tensor = getattr(self.best, name)
            grouped = values.unflatten(-1, (-1, self.per(name)))  # type: ignore[no-untyped-call]
            largest = grouped.abs().amax(-1, keepdim=True)
            stored = part.quantize(values)
            codes = (stored.codes.to(torch.int32) + step).clamp(part.grid.low, part.grid.high)
            moved = (codes * stored.scale.dequantize().repeat_interleave(self.per(name), -1)).view_as(grouped)
            fixed = (grouped.abs() == largest) | (moved.abs() > largest)
            if name == "scale":
                fixed |= moved == 0
            yield self.best._replace(**{name: torch.where(fixed, grouped, moved).flatten(-2)})

    def per(self, name: str) -> int:
        """How many blocks a super-block has."""
        granularity: Any = getattr(self.format, name).granularity
        return int(granularity.size)

    def attempt_all(self, candidates: Iterator[Affine], per_super_block: bool) -> None:
        """Keep what has less error than the best so far, block by block or super-block by super-block."""
        for candidate in candidates:
            errors = self.errors(candidate)
            old, new = (self.total(e) if per_super_block else e for e in (self.least, errors))
            better = new < old
            self.least = torch.where(better, errors, self.least)
            self.best = combine(partial(_where, better), candidate, self.best)

    def total(self, errors: Tensor) -> Tensor:
        """The errors of super-blocks, at each of their blocks."""
        per = self.per("scale")
        grouped = errors.unflatten(-1, (-1, per))  # type: ignore[no-untyped-call]
        total: Tensor = grouped.sum(-1, keepdim=True).expand_as(grouped).flatten(-2)
        return total

    def errors(self, stored: Affine) -> Tensor:
        """The squared error of each block, float64 in the shape of the scale."""
        assert stored.scale is not None
        difference = self.format.nearest(self.x, stored) - self.x
        rows = blocks(difference, tuple(stored.scale.shape))
        squares: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        return squares.reshape(stored.scale.shape)


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)
