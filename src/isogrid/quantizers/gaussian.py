"""The best range for normally distributed data, from the format alone."""

from functools import lru_cache

import torch

from isogrid.formats import Format
from isogrid.quantizers.fitting import bound, row_format
from isogrid.quantizers.least_error import VECTORS, least_error_affine


def gaussian_multiple(fmt: Format) -> float:
    """How many standard deviations the range with the least squared error reaches, for Gaussian data.

    >>> from isogrid.formats import named_format
    >>> round(gaussian_multiple(named_format("int4/group32:midrise")), 3)
    2.514
    """
    return _gaussian_multiple(row_format(fmt))


# As `torch.compiler.assume_constant_result` says it; a call of that loads the compiler, half of what Isogrid loads.
gaussian_multiple._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
@torch.no_grad()
def _gaussian_multiple(fmt: Format) -> float:
    if fmt.grid.dimension == 1:
        values = torch.linspace(-7.0, 7.0, 2**16 + 1)[None]
        weights = torch.exp(-values.to(torch.float64).square() / 2)
    else:
        # A codebook holds neighbours together, so these must be independent: a fixed sample stands for the density.
        values = torch.randn(1, fmt.grid.dimension * VECTORS, generator=torch.Generator().manual_seed(0))
        weights = None
    affine = least_error_affine(values, fmt, weights)
    reach = bound(fmt.grid) if fmt.is_symmetric else (fmt.grid.highest - fmt.grid.lowest) / 2
    assert affine.scale is not None
    return affine.scale.item() * reach
