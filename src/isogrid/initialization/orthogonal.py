"""Rotations to turn channels by."""

import torch
from torch import Generator, Tensor

from isogrid.layers.hadamard import hadamard_matrix


def random_rotation(size: int, generator: Generator) -> Tensor:
    """A rotation that mixes every channel with every other, float64 [size, size].

    A Hadamard matrix of the largest power of two that divides the size, times (Kronecker) a random rotation of what is
    left, with random signs: for sizes that are powers of two it is the randomised Hadamard matrix of QuaRot (Ashkboos
    et al., arXiv 2404.00456).

    >>> turn = random_rotation(12, Generator().manual_seed(0))
    >>> bool(torch.allclose(turn @ turn.T, torch.eye(12, dtype=torch.float64)))
    True
    """
    power = size & -size
    mixed = torch.kron(hadamard_matrix(power) / power**0.5, _orthogonal(size // power, generator))
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1.0
    return signs * mixed


def rotation_around_the_mean(size: int, generator: Generator) -> Tensor:
    """A random rotation that leaves the mean of the channels where it is, float64 [size, size].

    So it passes through the LayerNorms of a network, which subtract the mean: it turns the space at right angles to
    the vector of ones, and nothing else.

    >>> turn = rotation_around_the_mean(8, Generator().manual_seed(0))
    >>> x = torch.arange(8.0, dtype=torch.float64)
    >>> bool(torch.allclose((x - x.mean()) @ turn, x @ turn - (x @ turn).mean()))
    True
    """
    basis: Tensor = torch.linalg.qr(torch.cat([torch.ones(size, 1), torch.eye(size)[:, 1:]], 1).double()).Q
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = _orthogonal(size - 1, generator)
    return basis @ inner @ basis.T


def _orthogonal(size: int, generator: Generator) -> Tensor:
    """Uniformly distributed (Mezzadri, arXiv math-ph/0609050)."""
    q: Tensor
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * torch.sign(r.diagonal())).contiguous()
