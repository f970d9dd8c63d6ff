"""A model and data so small that a run takes moments, and a way to die in the middle of it."""

import os
import signal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from isogrid.recipes.data import Data

calls = 0


def model(width: int = 8) -> nn.Module:
    """It drops out at random, so that a resumed run has to draw the same numbers."""
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))


class Noisy(Dataset):
    """Examples that are augmented at random."""

    def __init__(self, inputs: Tensor, targets: Tensor):
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index] + 0.1 * torch.randn(4), self.targets[index]


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(48, 4, generator=generator)
    targets = torch.randint(3, (48,), generator=generator)
    return Data(Noisy(inputs, targets), TensorDataset(inputs, targets), loss)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy; kills the process at the call that DIE_AT names, as a power cut would."""
    global calls
    calls += 1
    if str(calls) == os.environ.get("DIE_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(outputs, targets)


def diverging_data() -> Data:
    pairs = data()
    return Data(pairs.train, pairs.test, lambda outputs, targets: F.cross_entropy(outputs, targets) * float("nan"))


def plain_model() -> nn.Module:
    """It computes the same however a batch is divided."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def plain_data() -> Data:
    """Without noise."""
    pairs = data()
    return Data(pairs.test, pairs.test, loss)


def wide_model() -> nn.Module:
    """Its first layer has groups of 32."""
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3), nn.Identity())


WORDS = ("the", "cat", "sat", "on", "mat", "and", "dog", "ran", "to", "door", "while", "a", "bird", "sang", "of")


def prose(seed: int, words: int) -> str:
    """Random prose in which every word depends on the one before."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (words,), generator=generator).cumsum(0)
    return "".join(WORDS[int(step) % len(WORDS)] + (".\n" if step % 17 == 0 else " ") for step in steps)
