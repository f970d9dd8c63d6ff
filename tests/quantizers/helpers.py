"""Data and measures for the tests of ranges."""

from math import log10

import torch
from torch import Tensor

from isogrid.formats import Affine, Format
from isogrid.quantizers.fitting import row_format

FORMATS = [
    *("int4/group32", "int2/channel:midrise", "int8/tensor", "int8/tensor:asymmetric", "uint8/tensor", "uint2/tensor"),
    *("uint4/tensor:symmetric", "ternary", "binary", "nf4", "nf4-double", "fp4_e2m1/group32", "mxfp4", "nvfp4"),
    *("q4_0", "q4_1", "q4_k", "q6_k"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(rows: Tensor, affine: Affine, fmt: Format, weights: Tensor | None = None) -> Tensor:
    """Squared error of each row, through the format's own arithmetic."""
    difference = (row_format(fmt).fake_quantize(rows, *affine.reshape((-1, 1))) - rows).double()
    return (difference.square() * (1.0 if weights is None else weights)).sum(1)


def decibel(rows: Tensor, affine: Affine, fmt: Format, weights: Tensor | None = None) -> float:
    """Signal-to-noise ratio over all rows."""
    signal = (rows.double().square() * (1.0 if weights is None else weights)).sum()
    return 10 * log10(float(signal / errors(rows, affine, fmt, weights).sum()))


def normal_density() -> tuple[Tensor, Tensor]:
    """The standard normal distribution as values and how often each occurs."""
    values = torch.linspace(-6.5, 6.5, 2**16 + 1)[None]
    return values, torch.exp(-values.double().square() / 2)
