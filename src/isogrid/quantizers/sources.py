"""Tensors that are computed from others before they are quantised: a frozen weight and what trains beside it.

A weight `W + s·BA` as large as the layer is never kept: an operation saves W, A and B, which it would save anyway, and
computes the sum again in its backward pass, where the gradient of the sum lives as long as it takes to make those of A
and B from it. So L4Q (Jeon et al., arXiv 2402.04902) trains in the memory of LoRA.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """How a tensor is made from a given one and from others, which alone may train."""

    def forward(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor, in x's shape and dtype."""
        ...

    def backward(
        self, gradient: Tensor, x: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x and of each tensor, given that of the result; None where there is none."""
        ...


class Made(NamedTuple):
    """A source, and the tensors that it takes."""

    source: Source
    tensors: tuple[Tensor, ...]

    def of(self, x: Tensor) -> Tensor:
        """The tensor made from x, without a gradient.

        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]])
        >>> Made(LowRank((0.5,)), (a, b)).of(torch.zeros(2, 2))
        tensor([[0.5000, 1.0000],
                [1.5000, 3.0000]])
        """
        with torch.no_grad():
            return self.source.forward(x.detach(), [tensor.detach() for tensor in self.tensors])


@dataclass(frozen=True)
class LowRank:
    """`W + Σ sᵢ·BᵢAᵢ`, each A [rank, all dimensions of W but the first], each B [first dimension of W, rank].

    The sum is computed in the widest of the dtypes and rounded to W's once, in one order, so that a merged weight is
    the one that was trained, bit for bit.

    Args:
        scalings: s of each pair; the tensors are A, B of the first, A, B of the second, and so on.
    """

    scalings: tuple[float, ...]

    def forward(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return self.total(x, tensors).to(x.dtype).reshape(x.shape)

    def total(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The sum as a matrix, before it is rounded."""
        dtype = torch.promote_types(x.dtype, tensors[0].dtype)
        with torch.autocast(x.device.type, enabled=False):
            total = x.flatten(1).to(dtype)
            for scaling, a, b in self.pairs(tensors):
                total = torch.addmm(total, b.to(dtype), a.to(dtype), alpha=scaling)
        return total

    def backward(
        self, gradient: Tensor, x: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        return gradient, self.gradients(gradient.flatten(1), tensors)

    def gradients(self, gradient: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Those of all A and B, given that of the sum as a matrix."""
        found: list[Tensor | None] = []
        with torch.autocast(gradient.device.type, enabled=False):
            for scaling, a, b in self.pairs(tensors):
                rows = gradient.to(a.dtype)
                found += [(b.T @ rows).mul_(scaling), (rows @ a.T).mul_(scaling)]
        return found

    def pairs(self, tensors: Sequence[Tensor]) -> list[tuple[float, Tensor, Tensor]]:
        """The scaling, A and B of each pair."""
        return list(zip(self.scalings, tensors[0::2], tensors[1::2], strict=True))


@dataclass(frozen=True)
class Magnitudes:
    """DoRA's weight `m·V/‖V‖` with `V = W + Σ sᵢ·BᵢAᵢ`, a norm for each row (Liu et al., arXiv 2402.09353).

    The norm is a constant to the gradient, as in section 4.3 of the paper. The tensors are m [first dimension of W],
    and those of the sum.

    Args:
        update: the sum.
    """

    update: LowRank

    def forward(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        magnitude, *rest = tensors
        total = self.update.total(x, rest)
        factor = magnitude.to(total.dtype) / torch.linalg.vector_norm(total, dim=1)
        made: Tensor = (total * factor.unsqueeze(1)).to(x.dtype).reshape(x.shape)
        return made

    def backward(
        self, gradient: Tensor, x: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        magnitude, *rest = tensors
        total = self.update.total(x, rest)
        norms = torch.linalg.vector_norm(total, dim=1)
        rows = gradient.flatten(1).to(total.dtype)
        of_magnitude = (rows * total).sum(1) / norms
        of_total = rows * (magnitude.to(total.dtype) / norms).unsqueeze(1)
        of_x = of_total.to(gradient.dtype).reshape(gradient.shape)
        return of_x, [of_magnitude.to(magnitude.dtype), *self.update.gradients(of_total, rest)]


class _Make(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Source, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.source = source
        return source.forward(x, tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        of_x, rest = ctx.source.backward(gradient, x, tensors)
        return of_x, None, *rest


_make: Callable[..., Tensor] = _Make.apply


def make(x: Tensor, made: Made) -> Tensor:
    """The tensor that a source makes from x, differentiable, for where nothing quantises it."""
    return _make(x, made.source, *made.tensors)
