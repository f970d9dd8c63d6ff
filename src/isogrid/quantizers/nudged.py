"""TensorFlow's choice of a scale and a zero point.

`Nudge` of `fake_quant_ops_functor.h` in TensorFlow, after `LastValueQuantize` and `MovingAvgQuantize` of tfmot's
`quant_ops.py`, in float32 as they compute: the range is stretched to hold zero, and then shifted so that zero falls
on a whole code.
"""

import torch
from torch import Tensor

from isogrid.errors import FormatError
from isogrid.formats import Affine, Format, IntegerGrid


def nudged_affine(lowest: Tensor, highest: Tensor, fmt: Format) -> Affine:
    """Scale and zero point as TensorFlow derives them from the extremes of what was seen.

    A format without a zero point is tfmot's `symmetric`: the ends are as far from zero as the grid's are.

    Args:
        lowest, highest: float32 [blocks].
        fmt: of integers, with a zero point or symmetric.

    Returns:
        float32 parameters of shape [blocks]; where all values are 0 the scale is 0.

    Raises:
        FormatError: the grid is none of integers, or the format has an offset.

    >>> from isogrid.formats import named_format
    >>> nudged_affine(torch.tensor([-0.1]), torch.tensor([25.4]), named_format("uint8/tensor")).zero_point
    tensor([1.])
    """
    grid = fmt.grid
    if not isinstance(grid, IntegerGrid) or grid.midrise or fmt.offset is not None:
        raise FormatError(f"TensorFlow's fake quantisation knows integers with a zero point or symmetric, not {fmt}.")
    if fmt.zero_point is None:
        return Affine(_scale(*_mirrored(lowest, highest, grid), grid))
    lowest, highest = lowest.clamp(max=0.0), highest.clamp(min=0.0)
    scale = _scale(lowest, highest, grid)
    # TensorFlow's codes are unsigned; signed ones are these, shifted.
    shift = 2 ** (int(grid.bits) - 1) if grid.low < 0 else 0
    unsigned = (grid.low + shift) - lowest / torch.where(scale == 0, 1.0, scale)
    # std::round takes ties away from zero, here up; in float64 the sum is exact.
    zero_point = torch.floor(unsigned.to(torch.float64) + 0.5).to(torch.float32) - shift
    return Affine(scale, zero_point.clamp(grid.low, grid.high))


def _scale(lowest: Tensor, highest: Tensor, grid: IntegerGrid) -> Tensor:
    return (highest - lowest) / torch.full_like(highest, grid.high - grid.low)


def _mirrored(lowest: Tensor, highest: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """The ends, one of them moved out until they are as far from zero as those of the grid."""
    if grid.low >= 0:
        return torch.zeros_like(lowest), highest.clamp(min=0.0)
    ratio = torch.full_like(lowest, grid.high / grid.low)
    return torch.minimum(lowest, highest / ratio), torch.maximum(highest, lowest * ratio)
