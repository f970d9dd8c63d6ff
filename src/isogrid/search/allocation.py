"""The choice of one option for each of many things, with the least error that a budget of bits allows."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from isogrid.errors import PlanError


@dataclass(frozen=True)
class Option:
    """One way to store one thing.

    Attributes:
        name: of the format.
        bits: that it takes.
        error: that it makes, in units that add up over things.
    """

    name: str
    bits: float
    error: float


def too_small(budget: float, smallest: float) -> PlanError:
    """The error for a budget below what the smallest options take, both in bits."""
    return PlanError(
        f"A budget of {budget:,.0f} bits is too small: the smallest formats take {smallest:,.0f}. "
        "Raise it, or allow formats with fewer bits."
    )


def allocate(options: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """One option for each thing, with a total of at most `budget` bits and the least total error, near enough.

    Starts from the fewest bits and takes the steps that save the most error a bit, in that order, along the lower
    convex hull of each thing's options; what the hull leaves over goes to any option that still fits. The result
    misses the optimum by less than one step's error.

    Args:
        options: for each thing, at least one.
        budget: in bits.

    Raises:
        PlanError: even the smallest options take more.

    >>> few, many = Option("int2", 20, 9.0), Option("int8", 80, 1.0)
    >>> [option.name for option in allocate([[few, many], [Option("int2", 20, 2.0), many]], budget=100)]
    ['int8', 'int2']
    """
    hulls = [_hull(each) for each in options]
    chosen = [0] * len(hulls)
    left = budget - sum(hull[0].bits for hull in hulls)
    if left < 0:
        raise too_small(budget, budget - left)
    steps = [(-_gain(*hull[:2]), index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, index = heapq.heappop(steps)
        hull, at = hulls[index], chosen[index]
        cost = hull[at + 1].bits - hull[at].bits
        if cost > left:
            continue
        left -= cost
        chosen[index] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_gain(hull[at + 1], hull[at + 2]), index))
    found = [hull[at] for hull, at in zip(hulls, chosen, strict=True)]
    return _filled(found, options, left)


def _filled(found: list[Option], options: Sequence[Sequence[Option]], left: float) -> list[Option]:
    """Better options, hull or not, that what is left of the budget pays for."""
    while True:
        better = [
            (now.error - option.error, index, option)
            for index, (now, each) in enumerate(zip(found, options, strict=True))
            for option in each
            if option.error < now.error and option.bits - now.bits <= left
        ]
        if not better:
            return found
        _, index, option = max(better, key=lambda step: step[0])
        left -= option.bits - found[index].bits
        found[index] = option


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of error over bits, from the fewest bits on."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bits, option.error)):
        if hull and option.error >= hull[-1].error:
            continue
        if hull and option.bits == hull[-1].bits:
            continue
        hull.append(option)
        while len(hull) > 2 and _gain(hull[-2], hull[-1]) >= _gain(hull[-3], hull[-2]):
            del hull[-2]
    assert all(a.bits < b.bits for a, b in pairwise(hull))
    return hull


def _gain(less: Option, more: Option) -> float:
    """Error saved a bit."""
    return (less.error - more.error) / (more.bits - less.bits)
