"""What the tests of formats share: comparison by bits, and numbers that are hard to round."""

import numpy as np
import torch
from torch import Tensor


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and bits; any NaN equals any NaN."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    same = actual == expected
    if actual.is_floating_point():
        same = (same & (actual.signbit() == expected.signbit())) | (actual.isnan() & expected.isnan())
    assert same.all(), (
        f"{int((~same).sum())} of {same.numel()} differ, the first: {actual[~same][0]} and {expected[~same][0]}"
    )


def with_neighbours(values: Tensor) -> Tensor:
    """The float32 values, the midpoints between them, and of both the next float32 below and above."""
    values = torch.unique(values.to(torch.float32))
    points = torch.cat([values, ((values[:-1].double() + values[1:].double()) / 2).float()])
    infinity = torch.full_like(points, torch.inf)
    return torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])


def brute_force(x: Tensor, values: Tensor) -> Tensor:
    """The smallest distance of each x [n] to any of the values [m], in float64."""
    return (x.double()[:, None] - values.double()).abs().amin(1)


def random_floats(count: int, seed: int = 0) -> Tensor:
    """Finite float32 numbers whose bits are random: every exponent is as likely as any other."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    numbers = torch.from_numpy(bits.view(np.float32).copy())
    return numbers[numbers.isfinite()]
