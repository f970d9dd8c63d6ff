"""The lattice of Q4_K's super-blocks, of which `isogrid.formats.lattice` has the steps and codes of the blocks."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

LAST = 63
"""The largest scale or minimum of a block, in 6 bits; ggml's own quantiser gives it to the largest of each eight."""

NEAR = 0.2
"""Share of a step by which values may miss a lattice, beyond the rounding of their storage, and still be near it."""


@dataclass(frozen=True)
class Superblocks:
    """Lattices of super-blocks of `groups` blocks.

    Attributes:
        super_scale, super_offset: float64 [super-blocks], numbers of float16.
        scale_codes, offset_codes: int64 [super-blocks, groups], 0..63; an offset is subtracted.
        codes: int64 [super-blocks, groups, values].
    """

    super_scale: Tensor
    scale_codes: Tensor
    super_offset: Tensor
    offset_codes: Tensor
    codes: Tensor

    def take(self, rows: Tensor, other: "Superblocks", chosen: Tensor) -> None:
        """Replace rows by those that were chosen of others."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(other, field.name)[chosen]

    def values(self) -> Tensor:
        """float32 [super-blocks, groups, values], as runtimes decode them."""
        scale = (self.super_scale[:, None] * self.scale_codes).float()[..., None]
        offset = (self.super_offset[:, None] * self.offset_codes).float()[..., None]
        return self.codes.float() * scale - offset


def fit_superblocks(x: Tensor, steps: Tensor, codes: Tensor, half: Tensor) -> Superblocks:
    """Scales of scales and of offsets that reproduce blocks.

    Args:
        x: [super-blocks, groups, values], in the type of storage.
        steps: float64 [super-blocks, groups], roughly the step of each block.
        codes: int64 [super-blocks, groups, values]; each block's begin with 0, where its own may begin later.
        half: float64, of x's shape, by how much storage rounds.

    Returns:
        Where nothing reproduces all values, the one that comes closest.
    """
    best, error = _try(x, steps, codes, half, LAST, LAST)
    ends = [(end, LAST) for end in range(LAST - 1, 0, -1)] + [(LAST, end) for end in range(LAST - 1, 0, -1)]
    for scale_end, offset_end in ends:
        pending = ((error >= NEAR) & _whole(steps, scale_end)).nonzero().flatten()
        if pending.numel():
            tried, missed = _try(x[pending], steps[pending], codes[pending], half[pending], scale_end, offset_end)
            better = missed < error[pending]
            best.take(pending[better], tried, better)
            error[pending[better]] = missed[better]
    return best


def _whole(steps: Tensor, end: int) -> Tensor:
    """Whether steps [super-blocks, groups] are nearly whole multiples of the largest by this number: bool."""
    codes = steps / steps.amax(1, keepdim=True).clamp(min=1e-30) * end
    return ((codes - codes.round()).abs() < 0.25).all(1)


def _try(
    x: Tensor, steps: Tensor, codes: Tensor, half: Tensor, scale_end: int, offset_end: int
) -> tuple[Superblocks, Tensor]:
    """The best of a few neighbouring scales, where the largest of each super-block has these codes.

    Returns:
        It, and by how much of a step it misses a value, float64 [super-blocks]; 0 where it reproduces all to the bit.
    """
    top = steps.amax(1) / scale_end
    scale_codes = (steps / torch.where(top > 0, top, 1.0)[:, None]).round().clamp(0, LAST)
    weight = scale_codes.square().sum(1).clamp(min=1)
    rough = (steps * scale_codes).sum(1) / weight
    found: Superblocks | None = None
    error = torch.full_like(rough, torch.inf)
    for scale in _near(rough):
        for candidate in _offsets(x, scale, scale_codes, codes, offset_end):
            values, step = candidate.values(), (scale[:, None] * scale_codes).clamp(min=1e-30)
            wrong = (values.to(x.dtype) != x).flatten(1).any(1)
            distance = ((values.double() - x.double()).abs() - half).clamp(min=0).amax(2) / step
            missed = torch.where(wrong, distance.amax(1) + 1e-9, 0.0)
            if found is None:
                found, error = candidate, missed
                continue
            better = missed < error
            found.take(better.nonzero().flatten(), candidate, better)
            error = torch.where(better, missed, error)
            if bool((error == 0).all()):
                return found, error
    assert found is not None
    return found, error


def _offsets(x: Tensor, scale: Tensor, scale_codes: Tensor, codes: Tensor, end: int) -> list[Superblocks]:
    """With scales given: offsets on a common lattice, and where each block's codes begin."""
    step = scale[:, None] * scale_codes
    base = (x.double() - step[..., None] * codes).mean(2)  # of the codes as they are: step * start - offset
    room = 15 - codes.amax(2)
    least = (-base / torch.where(step > 0, step, torch.inf)).clamp(max=0).abs().ceil()  # an offset is not negative
    start = least.clamp(max=15)
    first = step * start - base
    top = first.amax(1) / end
    results = []
    for shift in (0, 1):  # of the block with the largest offset
        extreme = torch.nn.functional.one_hot(first.argmax(1), first.shape[1]) * shift
        largest = (first + step * extreme).amax(1) / end if shift else top
        unit = torch.where(largest > 0, largest, 1.0)[:, None]
        choices = torch.stack([first + step * extra for extra in range(3)])
        fits = torch.stack([(start + extra) <= room for extra in range(3)])
        distance = ((choices / unit) - (choices / unit).round()).abs() + torch.where(fits, 0.0, 10.0)
        extra = distance.argmin(0)
        chosen = choices.gather(0, extra[None])[0]
        offset_codes = (chosen / unit).round().clamp(0, LAST)
        total = offset_codes.square().sum(1).clamp(min=1)
        rough = (chosen * offset_codes).sum(1) / total
        placed = (codes + (start + extra)[..., None].to(torch.int64)).clamp(0, 15)
        whole = scale_codes.to(torch.int64), offset_codes.to(torch.int64)
        results += [
            Superblocks(scale.clone(), whole[0].clone(), offset, whole[1].clone(), placed.clone())
            for offset in _near(rough)
        ]
    return results


def _near(rough: Tensor) -> list[Tensor]:
    """The nearest number of float16 and its neighbours, float64."""
    middle = rough.to(torch.float16)
    ends = [torch.nextafter(middle, torch.full_like(middle, limit)) for limit in (torch.inf, -torch.inf)]
    return [number.double() for number in (middle, *ends)]
