"""The measure of memory counts what a function holds, whatever else is freed meanwhile."""

import gc

import torch

from isogrid.training.memory import peak_bytes


class Cycle:
    """What only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself, self.tensor = self, torch.zeros(100_000)


def test_garbage_of_an_earlier_measurement_does_not_lower_the_peak() -> None:
    def function() -> None:
        gc.collect()
        torch.zeros(1000)

    assert peak_bytes(Cycle) >= 400_000
    assert 4000 <= peak_bytes(function) < 5000
