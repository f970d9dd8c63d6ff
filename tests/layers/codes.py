"""Random codes, scales and zero points, ties included."""

import random

import torch
from torch import Tensor

U8 = torch.uint8


def codes(*shape: int, low: int = 0, high: int = 255, dtype: torch.dtype = U8) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=dtype)


def zero_point() -> Tensor:
    return codes(1) if random.random() < 0.7 else torch.tensor([random.choice([0, 255])], dtype=U8)


def scale() -> Tensor:
    """Half of them have a short mantissa, so that ratios are round and results lie halfway between two codes."""
    if random.random() < 0.5:
        return torch.rand(1) * 0.1 + 0.001
    return torch.tensor([random.randint(1, 64) / 2 ** random.randint(4, 9)])


def every_pair() -> tuple[Tensor, Tensor]:
    values = torch.arange(256, dtype=U8)
    return values.repeat_interleave(256)[None], values.repeat(256)[None]


def all_equal(ours: Tensor, runtime: Tensor) -> None:
    assert ours.dtype == runtime.dtype
    assert ours.shape == runtime.shape
    differing = int((ours != runtime).sum())
    assert differing == 0, f"{differing} of {ours.numel()} differ"
