"""Finding the lattice that rounded values lie on: the scales and codes of a checkpoint that holds neither.

A model trained on a grid and saved as bfloat16 holds `round(scale * code)`, where the scale is not known. For each
block the scale is found whose multiples, rounded to the type of storage, are all its values: nothing has to be
quantised anew. The step of a lattice is a common divisor of noisy numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.errors import FormatError
from isogrid.formats.floats import NativeGrid
from isogrid.formats.format import Affine, Format, Quantized
from isogrid.formats.granularity import PerChannel, PerGroup
from isogrid.formats.grid import IntegerGrid
from isogrid.formats.superblocks import NEAR, fit_superblocks

SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
TINY = 1e-9
"""Added to the distance of a block that a lattice does not reproduce to the last bit, so that it is not 0."""


@dataclass(frozen=True)
class Lattice:
    """What was found of a tensor.

    Attributes:
        quantized: the lattice's scales and codes; where there is none, those of ggml-style rounding to the nearest.
        exact: bool [blocks]: whether the block's values are those of the lattice, rounded to the type of storage.
        near: bool [blocks]: exact, or within a fifth of a step.
        residual: float32 [blocks]: the largest distance from the lattice in steps, beyond the rounding of storage.
        requantised: bool [blocks]: whether rounding to the nearest on scales from the values, the usual route, gives
            other codes, counted from the zero point, than the lattice has.
    """

    quantized: Quantized
    exact: Tensor
    near: Tensor
    residual: Tensor
    requantised: Tensor


@dataclass(frozen=True)
class Multiples:
    """Which multiples of a scale the values of a block may be.

    Attributes:
        low, high: the ends.
        span: how far the smallest and the largest of a block, or zero, may lie apart.
        flips: the scale may be negative.
        dtype: of the scale.
    """

    low: int
    high: int
    span: int
    flips: bool
    dtype: torch.dtype

    @staticmethod
    def of(fmt: Format, grid: IntegerGrid) -> "Multiples":
        """Of an integer format; a zero point may be any code, so that zero is among the values in any case."""
        assert fmt.scale is not None and isinstance(fmt.scale.grid, NativeGrid)
        span, dtype = grid.high - grid.low, fmt.scale.grid.dtype
        if fmt.zero_point is not None:
            return Multiples(-span, span, span, fmt.signed_scale, dtype)
        return Multiples(grid.low, grid.high, span, fmt.signed_scale, dtype)


@dataclass(frozen=True)
class Blocks:
    """Lattices of many blocks.

    Attributes:
        scale: float64 [blocks], numbers that storage has.
        offset: likewise; zeros where there are none.
        codes: int64 [blocks, values].
    """

    scale: Tensor
    offset: Tensor
    codes: Tensor

    def values(self) -> Tensor:
        """float32 [blocks, values], as runtimes decode them."""
        return self.codes.float() * self.scale.float()[:, None] + self.offset.float()[:, None]

    def merged(self, other: "Blocks", chosen: Tensor) -> "Blocks":
        """Those of the other where it was chosen, bool [blocks]."""
        pairs = ((getattr(other, name), getattr(self, name)) for name in ("scale", "offset", "codes"))
        return Blocks(*[torch.where(chosen[(...,) + (None,) * (a.dim() - 1)], a, b) for a, b in pairs])


def find_lattice(x: Tensor, fmt: Format) -> Lattice:
    """The scales and codes of values that were rounded after they had been on a grid.

    Args:
        x: bfloat16, float16 or float32 [..., n].
        fmt: q4_0, q4_1, q8_0, q4_k, or integers by group or by channel on float scales, such as `int4/group128` and
            `uint4/group32:scale=bfloat16`.

    Raises:
        FormatError: the format is another one, or its blocks do not divide the rows.

    >>> from isogrid.formats import named_format
    >>> trained = named_format("q4_0").quantize(torch.randn(4, 64))
    >>> found = find_lattice(trained.dequantize().bfloat16(), named_format("q4_0"))
    >>> found.exact.all(), torch.equal(found.quantized.codes, trained.codes)
    (tensor(True), True)
    """
    shape = tuple(x.shape)
    if x.dtype not in SIGNIFICANT_BITS:
        raise FormatError(f"Lattices are found in bfloat16, float16 and float32, not in {x.dtype}.")
    grid = _grid_of(fmt)
    scale_shape = fmt.scale_shape(shape)
    block = shape[-1] // scale_shape[-1]
    if fmt.scale is not None and fmt.scale.scale is not None:
        return _of_superblocks(x, fmt, block)
    rows = x.detach().reshape(-1, block)
    found = _affine(rows, grid) if fmt.offset is not None else _symmetric(rows, Multiples.of(fmt, grid))
    residual = _residual(rows, found)
    near = residual < NEAR
    quantized, other = _stored(fmt, found, near, fmt.quantize(x.float()))
    return Lattice(quantized, _exact(rows, found), near, residual, other)


def _grid_of(fmt: Format) -> IntegerGrid:
    """The integers of a format whose lattices are found; raises FormatError for others."""
    grid, scale = fmt.grid, fmt.scale
    group = isinstance(fmt.granularity, PerGroup) and fmt.granularity.axis == -1 and not fmt.granularity.pads
    known = isinstance(grid, IntegerGrid) and not grid.midrise and grid.bits <= 8 and scale is not None
    if known and scale is not None and (group or fmt.granularity == PerChannel(0)):
        plain = isinstance(scale.grid, NativeGrid) and scale.grid.dtype in SIGNIFICANT_BITS
        super_blocks = scale.scale is not None and fmt.offset is not None
        halves = fmt.offset is None or (plain and scale.grid == NativeGrid(torch.float16))
        if isinstance(grid, IntegerGrid) and (super_blocks or (plain and halves)):
            return grid
    raise FormatError(
        "Lattices are found of q4_0, q4_1, q8_0, q4_k, and of integers by group or by channel on float scales, such as "
        f"int4/group128:scale=bfloat16, not of {fmt}."
    )


def _stored(fmt: Format, found: Blocks, near: Tensor, usual: Quantized) -> tuple[Quantized, Tensor]:
    """What was found where it is near, and what is usual elsewhere; and bool [blocks], where the codes are others."""
    shape, affine = usual.shape, usual.affine
    grid = _grid_of(fmt)
    zero = -found.codes.amin(1).clamp(max=0) + grid.low if fmt.zero_point is not None else None
    ours = Affine(found.scale, zero, found.offset if fmt.offset is not None else None)
    parts = {}
    for name, part in ours._asdict().items():
        theirs, kind = getattr(affine, name), getattr(fmt, name)
        if part is not None:
            values = torch.where(near, part.float(), theirs.reshape(-1))
            parts[name] = kind.quantize(values.reshape(theirs.shape))
    codes = found.codes if zero is None else found.codes + zero[:, None]
    old = usual.codes.reshape(codes.shape).to(torch.int64)
    shifted = old if affine.zero_point is None else old - affine.zero_point.reshape(-1, 1).to(torch.int64)
    other = near & (shifted != found.codes).any(1)
    codes = torch.where(near[:, None], codes, old).reshape(shape).to(usual.codes.dtype)
    return Quantized(codes, fmt, shape, **parts), other


def _of_superblocks(x: Tensor, fmt: Format, block: int) -> Lattice:
    assert fmt.scale is not None and fmt.offset is not None
    shape, usual = tuple(x.shape), fmt.quantize(x.float())
    assert usual.scale is not None and usual.scale.scale is not None
    assert usual.offset is not None and usual.offset.scale is not None
    group = usual.scale.codes.numel() // usual.scale.scale.codes.numel()
    rows = x.detach().reshape(-1, block)
    steps = _affine_fit(rows, 15)
    whole_rows, codes = rows.reshape(-1, group, block), steps.codes.reshape(-1, group, block)
    found = fit_superblocks(whole_rows, steps.scale.reshape(-1, group), codes, half_step(whole_rows))
    blocks = Blocks(
        (found.super_scale[:, None] * found.scale_codes).flatten(),
        -(found.super_offset[:, None] * found.offset_codes).flatten(),
        found.codes.reshape(-1, block),
    )
    residual = _residual(rows, blocks)
    whole = (residual < NEAR).reshape(-1, group).all(1)
    near = whole.repeat_interleave(group)

    def pick(ours: Tensor, theirs: Tensor, per: int) -> Tensor:
        chosen = whole.repeat_interleave(per).reshape(theirs.shape)
        return torch.where(chosen, ours.reshape(theirs.shape).to(theirs.dtype), theirs)

    def part(kind: Format, stored: Quantized, codes: Tensor, top: Tensor) -> Quantized:
        assert stored.scale is not None
        scale = Quantized(pick(top, stored.scale.codes, 1), stored.scale.format, stored.scale.shape)
        return Quantized(pick(codes, stored.codes, group), kind, stored.shape, scale=scale)

    quantized = Quantized(
        pick(found.codes, usual.codes, group * block),
        fmt,
        shape,
        scale=part(fmt.scale, usual.scale, found.scale_codes, found.super_scale),
        offset=part(fmt.offset, usual.offset, -found.offset_codes, found.super_offset),
    )
    exact = _exact(rows, blocks).reshape(-1, group).all(1).repeat_interleave(group)
    other = (usual.codes.reshape(-1, block) != quantized.codes.reshape(-1, block)).any(1)
    return Lattice(quantized, exact, near, residual, other)


def half_step(x: Tensor) -> Tensor:
    """Half the distance between neighbouring numbers of x's type at each value, float64."""
    _, exponent = torch.frexp(x.double())
    least = -25 if x.dtype == torch.float16 else -150
    return torch.exp2((exponent - SIGNIFICANT_BITS[x.dtype] - 1).clamp(min=least).double())


def _symmetric(x: Tensor, allowed: Multiples) -> Blocks:
    """Multiples of a scale.

    First the largest value is tried as the grid's ends, as most quantisers have it; then the smallest as 1, 2, 3, ...
    steps, until all others are multiples too; what is on no lattice to the last bit then gets the nearest.
    """
    top = x.double().abs().amax(1)
    reach = max(-allowed.low, allowed.high)
    smallest = torch.where(x.abs() > top[:, None] / (4 * reach), x.abs().double(), torch.inf).amin(1)
    ratio = torch.where(top > 0, top / smallest, 1.0)
    zero = torch.zeros_like(top)
    found = Blocks(zero, zero, torch.zeros(x.shape, dtype=torch.int64, device=x.device))
    best = torch.where(top > 0, torch.inf, 0.0).double()

    def attempt(ends: Tensor, bound: float) -> bool:
        """Try the largest value as so many steps where what was found misses by the bound; whether some still do."""
        nonlocal found
        pending = ((best >= bound) & (ends >= 1) & (ends <= reach)).nonzero().flatten()
        if pending.numel():
            tried = _multiples(x[pending], ends[pending], allowed)
            missed = torch.where(_exact(x[pending], tried), 0.0, _residual(x[pending], tried).double() + TINY)
            better = missed < best[pending]
            found = found.merged(_spread(tried, pending, found), _marked(better, pending, len(top)))
            best[pending] = torch.where(better, missed, best[pending])
        return bool((best >= bound).any())

    usual = (torch.full_like(top, end) for end in (-allowed.low, allowed.high))
    by_smallest = ((ratio * steps).round() + shift for steps in range(1, reach + 1) for shift in (0, 1, -1))
    if all(attempt(ends, TINY) for ends in (*usual,)) and all(attempt(ends, TINY) for ends in by_smallest):
        all(attempt(torch.full_like(top, end), NEAR / 2) for end in range(1, reach + 1))
    return found


def _multiples(x: Tensor, ends: Tensor, allowed: Multiples) -> Blocks:
    """Codes where the largest value is so many steps, and the storable scale amid all that give them."""
    v = x.double()
    top = v.abs().amax(1, keepdim=True)
    scale = top / ends[:, None]
    for certain in (40, 64, 96, torch.inf):  # of far codes a rough scale, and the rounding of storage, leave doubt
        codes = (v / scale).round()
        codes = torch.where(codes.abs() <= certain, codes, 0.0)
        codes = torch.where(v.abs() == top, v.sign() * ends[:, None], codes)
        scale = _middle(v, x, codes)[:, None]
    if allowed.flips:  # a code above the grid's largest asks for a negative scale
        codes = torch.where((codes.amax(1) > allowed.high)[:, None], -codes, codes)
    least, most = codes.amin(1).clamp(max=0), codes.amax(1).clamp(min=0)
    fits = (least >= allowed.low) & (most <= allowed.high) & (most - least <= allowed.span)
    codes = torch.where(fits[:, None], codes, 0.0)
    scale = _middle(v, x, codes).to(allowed.dtype).double()
    return Blocks(scale, torch.zeros_like(scale), codes.to(torch.int64))


def _middle(v: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """The middle of the scales whose multiples by the codes round to values, or the one that comes closest.

    Args:
        v: float64 [blocks, values], the multiples.
        x: their storage, which may hold an offset besides.
        codes: float64 [blocks, values].
    """
    divisor = torch.where(codes == 0, 1.0, codes)
    outer = half_step(x)
    # Below a power of two numbers lie twice as close.
    inner = torch.where(torch.frexp(x.double())[0].abs() == 0.5, outer / 2, outer)
    down, up = torch.where(x > 0, inner, outer), torch.where(x > 0, outer, inner)
    ends = torch.stack([(v - down) / divisor, (v + up) / divisor])
    low = torch.where(codes == 0, -torch.inf, ends.amin(0)).amax(1)
    high = torch.where(codes == 0, torch.inf, ends.amax(0)).amin(1)
    total = (codes * codes).sum(1)
    least = (v * codes).sum(1) / total.clamp(min=1)
    return torch.where((low <= high) & (total > 0), (low + high) / 2, least)


def _affine(x: Tensor, grid: IntegerGrid) -> Blocks:
    """Multiples of a scale plus an offset, both numbers of float16."""
    rough = _affine_fit(x, int(grid.high))
    best = _offsetted(x, rough, torch.arange(len(x), device=x.device), 0, 0)
    done = _exact(x, best) | (_residual(x, rough) > NEAR / 8)  # noise is on no lattice to the last bit
    for start in range(int(grid.high)):
        for ulps in (0, 1, -1, 2, -2, 3, -3, 4, -4):
            pending = (~done & (rough.codes.amax(1) + start <= grid.high)).nonzero().flatten()
            if pending.numel() == 0:
                return best
            tried = _offsetted(x[pending], rough, pending, start, ulps)
            exact = _exact(x[pending], tried)
            best = best.merged(_spread(tried, pending, best), _marked(exact, pending, len(x)))
            done[pending[exact]] = True
    return best


def _offsetted(x: Tensor, rough: Blocks, rows: Tensor, start: int, ulps: int) -> Blocks:
    codes = (rough.codes[rows] + start).double()
    offset = (rough.offset[rows] - start * rough.scale[rows]).to(torch.float16)
    offset = _neighbour(offset, ulps)
    scale = _middle(x.double() - offset[:, None], x, codes).to(torch.float16).double()
    return Blocks(scale, offset, codes.to(torch.int64))


def _neighbour(x: Tensor, ulps: int) -> Tensor:
    """The number of float16 so many steps away, as float64."""
    for _ in range(abs(ulps)):
        x = torch.nextafter(x, torch.full_like(x, torch.inf if ulps > 0 else -torch.inf))
    return x.double()


def _affine_fit(x: Tensor, largest: int) -> Blocks:
    """Rough scales and offsets, the spread of a block tried as so many steps; codes begin with 0."""
    v = x.double()
    low, high = v.amin(1), v.amax(1)
    flat = high == low
    found = Blocks(torch.zeros_like(low), low, torch.zeros_like(v, dtype=torch.int64))
    best = torch.where(flat, 0.0, torch.inf).double()
    for steps in range(largest, 0, -1):  # the whole grid first, as most quantisers have it
        pending = (best >= NEAR).nonzero().flatten()
        if pending.numel() == 0:
            break
        tried = _least_squares(v[pending], (high - low)[pending] / steps, low[pending])
        residual = _residual(x[pending], tried).double()
        better = residual < best[pending]
        found = found.merged(_spread(tried, pending, found), _marked(better, pending, len(v)))
        best[pending] = torch.where(better, residual, best[pending])
    return found


def _least_squares(v: Tensor, scale: Tensor, offset: Tensor) -> Blocks:
    for _ in range(2):
        codes = ((v - offset[:, None]) / scale[:, None]).round().clamp(min=0)
        centred = codes - codes.mean(1, keepdim=True)
        spread = centred.square().sum(1)
        scale = torch.where(spread > 0, (v * centred).sum(1) / spread.clamp(min=1e-9), scale)
        offset = v.mean(1) - scale * codes.mean(1)
    return Blocks(scale, offset, codes.to(torch.int64))


def _residual(x: Tensor, found: Blocks) -> Tensor:
    """float32 [blocks]: the largest distance from the lattice in steps, beyond the rounding of storage."""
    values = found.codes.double() * found.scale[:, None] + found.offset[:, None]
    # The scale is a number of float16 itself: far codes feel its rounding where the true one was another.
    miss = ((x.double() - values).abs() - half_step(x)).clamp(min=0).amax(1)
    step = found.scale.abs()
    return torch.where(miss == 0, 0.0, miss / torch.where(step > 0, step, 0.0)).float()


def _exact(x: Tensor, found: Blocks) -> Tensor:
    return (found.values().to(x.dtype) == x).all(1)


def _spread(part: Blocks, rows: Tensor, like: Blocks) -> Blocks:
    """Some blocks in their places among all."""
    result = Blocks(like.scale.clone(), like.offset.clone(), like.codes.clone())
    result.scale[rows], result.offset[rows], result.codes[rows] = part.scale, part.offset, part.codes
    return result


def _marked(chosen: Tensor, rows: Tensor, count: int) -> Tensor:
    marked = torch.zeros(count, dtype=torch.bool, device=rows.device)
    marked[rows[chosen]] = True
    return marked
