"""Counting what differs between two tensors, over many batches."""

import torch
from torch import Tensor


class Tally:
    """How many entries were compared, how many differ, and by how much. NaN is equal to NaN.

    Attributes:
        compared, differing: entries.
        largest: the largest absolute difference; infinite where NaN meets a number, or shapes differ.
        reach: the largest finite magnitude on the expected side, or what was given instead.

    >>> tally = Tally()
    >>> tally.add(torch.tensor([1, 2, 5]), torch.tensor([1, 2, 3]))
    >>> tally.counts, tally.largest
    ((3, 1), 2.0)
    """

    def __init__(self) -> None:
        self.compared = self.differing = 0
        self.largest = self.reach = 0.0

    @property
    def counts(self) -> tuple[int, int]:
        """Compared and differing entries."""
        return self.compared, self.differing

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest magnitude expected."""
        return self.largest / self.reach if self.reach > 0 else self.largest

    def add(self, actual: Tensor, expected: Tensor, reach: float | None = None) -> None:
        """Compare two tensors of one shape.

        Args:
            actual, expected: of any dtype.
            reach: what a relative difference is relative to, where that is not the largest magnitude expected.
        """
        self.compared += expected.numel()
        if actual.shape != expected.shape:
            self.differing += expected.numel()
            self.largest = float("inf")
            return
        if reach is None and expected.is_floating_point() and expected.numel():
            reach = float(expected.abs().nan_to_num(posinf=0.0).max())
        self.reach = max(self.reach, reach or 0.0)
        if torch.equal(actual.to(expected.dtype), expected) and actual.dtype == expected.dtype:
            return
        a, b = actual.double(), expected.double()
        differs = ~((a == b) | (a.isnan() & b.isnan()))
        self.differing += int(differs.sum())
        if differs.any():
            self.largest = max(self.largest, float((a - b)[differs].abs().nan_to_num(nan=torch.inf).max()))
