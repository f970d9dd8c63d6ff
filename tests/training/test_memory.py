"""The measure of memory counts what a function holds, whatever else is freed meanwhile."""

import gc

import torch

from isogrid.training.memory import peak_bytes


def test_garbage_from_before_does_not_lower_the_peak() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself, self.tensor = self, torch.zeros(100_000)

    def function() -> None:
        gc.collect()
        torch.zeros(1000)

    gc.collect()
    Cycle()
    assert 4000 <= peak_bytes(function) < 5000
