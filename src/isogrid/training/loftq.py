"""LoftQ: adapters beside a quantised weight begin with what quantisation took away from it."""

from typing import Any, Literal

import torch
from torch import Tensor

from isogrid.errors import PlanError
from isogrid.layers.adapters import AdapterSpec
from isogrid.layers.coded import CodedLinear
from isogrid.quantizers import Quantizer

Start = Literal["zero", "loftq"]
"""Where the updates of adapters start from."""

ITERATIONS = 5


def loftq(layer: Any, spec: AdapterSpec) -> tuple[Tensor, Tensor]:
    """Share a layer's weight out between its grid and an update; what the grid is to hold replaces the weight.

    Args:
        layer: a prepared Linear with a float weight.
        spec: of the adapter.

    Returns:
        A [rank, in] and B [out, rank].

    Raises:
        PlanError: the weight is kept as codes already.
    """
    if isinstance(layer, CodedLinear):
        raise PlanError("LoftQ starts from float weights, and these are kept as codes already.")
    rest, a, b, _ = alternate(layer.weight.detach(), layer.weight_quantizer, spec.rank, spec.scaling)
    layer.weight.data.copy_(rest)
    layer.weight_quantizer.fit(layer.weight)
    return a, b


@torch.no_grad()
def alternate(
    weight: Tensor, quantizer: Quantizer, rank: int, scaling: float = 1.0, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Quantise `W - s·BA`, then take the best update of the rest, in turns (LoftQ, Li et al., arXiv 2310.08659).

    It ends where the error rises, as in LQ-LoRA (Guo et al., arXiv 2311.12023), after five turns at the latest; with an
    importance, the error of row i and column j counts by `r_i c_j`, the means of its root over rows and columns.

    Args:
        weight: [out, in].
        quantizer: of its format and range; it is fitted anew.
        rank, scaling: of the update.
        importance: None, or at least 0 [out, in], such as the mean of squared gradients (Fisher information).

    Returns:
        What is to be quantised, `W - s·BA` [out, in]; A [rank, in] and B [out, rank] of the update that goes with it;
        the error of each turn, the root of the (weighted) squares.

    >>> from isogrid.formats import named_format
    >>> from isogrid.quantizers import LSQ, MSE
    >>> weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> quantizer = Quantizer(named_format("int2/group32"), (64, 64), MSE(), LSQ(), "frozen")
    >>> *_, errors = alternate(weight, quantizer, rank=8)
    >>> errors[-1] < errors[0]
    True
    """
    whole = weight.to(torch.float32)
    rows, columns = _factors(whole, importance)
    rest, best = whole, None
    errors: list[float] = []
    for _ in range(ITERATIONS):
        quantizer.fit(rest)
        missing = whole - quantizer.quantize(rest).dequantize()
        u, s, v = torch.linalg.svd(rows * missing * columns, full_matrices=False)
        root = (s[:rank] / scaling).sqrt()
        b, a = u[:, :rank] * root / rows, root.unsqueeze(1) * v[:rank] / columns
        error = float(torch.linalg.vector_norm(rows * (missing - scaling * (b @ a)) * columns))
        if errors and error >= errors[-1]:
            break
        errors.append(error)
        best = (rest, a, b)
        rest = whole - scaling * (b @ a)
    assert best is not None
    return (*best, errors)


def _factors(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """By what the error of each row and of each column counts, [out, 1] and [1, in]."""
    if importance is None:
        return torch.ones_like(weight[:, :1]), torch.ones_like(weight[:1])
    root = importance.to(torch.float32).sqrt()
    smallest = torch.finfo(torch.float32).tiny ** 0.5
    return root.mean(1, keepdim=True).clamp(min=smallest), root.mean(0, keepdim=True).clamp(min=smallest)
