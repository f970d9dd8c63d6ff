"""Functions that are made of others: in the scope of a prepared module they run as these, which can be sites.

They take the arguments of the torch function; where they cannot do what these ask for, they return NotImplemented, and
the torch function runs as it is.
"""

from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`: two matrix products with a softmax in between.

    >>> q, k, v = torch.randn(3, 2, 4, 5, 8)
    >>> torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-6)
    True
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    factor = 1 / sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1))
    if attn_mask is None and not is_causal:
        scores = scores * factor
    else:
        scores = masked_scores(scores, factor, attn_mask, is_causal)
    weights = F.softmax(scores, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # A query that may see no key at all gets zeros, as in PyTorch.
        weights = weights.masked_fill(attn_mask.logical_not(), 0.0)
    return torch.matmul(F.dropout(weights, dropout_p, training=dropout_p > 0), value)


def masked_scores(scores: Tensor, factor: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The scores of attention times a factor, with a mask: float in every runtime, for no grid holds -inf.

    Args:
        scores: [..., queries, keys].
        factor: of the scores.
        mask: what to add, or, as booleans, what to keep; it broadcasts.
        is_causal: whether a query sees only the keys up to its own place.
    """
    if has_torch_function((scores,)):
        return handle_torch_function(masked_scores, (scores,), scores, factor, mask, is_causal)
    scores = scores * factor
    if is_causal:
        kept = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(kept.logical_not(), -torch.inf)
    if mask is None:
        return scores
    # Finite, so that a row without any key has a gradient; exp makes zeros of it all the same.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(mask.logical_not(), lowest) if mask.dtype == torch.bool else scores + mask


def einsum(equation: Any, *operands: Any) -> Any:
    """`torch.einsum` of two operands as a matrix product.

    >>> a, b = torch.randn(2, 3, 4, 5), torch.randn(4, 2, 6, 5)
    >>> torch.allclose(einsum("bihd,hbjd->ihbj", a, b), torch.einsum("bihd,hbjd->ihbj", a, b), atol=1e-5)
    True
    """
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    parsed = _parsed(equation) if isinstance(equation, str) and len(operands) == 2 else None
    if parsed is None:
        return NotImplemented
    (left, right), output = parsed
    a, b = operands
    sizes = dict(zip(left, a.shape, strict=True)) | dict(zip(right, b.shape, strict=True))
    both = [label for label in left if label in right]
    batch, summed = [x for x in both if x in output], [x for x in both if x not in output]
    rows, columns = [x for x in left if x not in both], [x for x in right if x not in both]

    def arranged(x: Tensor, labels: str, *groups: list[str]) -> Tensor:
        order = [labels.index(label) for group in (batch, *groups) for label in group]
        shape = [sizes[label] for label in batch] + [prod(sizes[label] for label in group) for group in groups]
        return x.permute(order).reshape(shape)

    product = torch.matmul(arranged(a, left, rows, summed), arranged(b, right, summed, columns))
    labels = [*batch, *rows, *columns]
    return product.reshape([sizes[label] for label in labels]).permute([labels.index(label) for label in output])


def _parsed(equation: str) -> tuple[list[str], str] | None:
    """Labels of both operands and of the output, where every label of one operand alone is in the output."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    labels = "".join(parts)
    if not arrow:
        output = "".join(sorted(label for label in set(labels) if labels.count(label) == 1))
    plain = "." not in equation and all(len(set(part)) == len(part) for part in parts)
    alone = {label for label in labels if labels.count(label) == 1}
    return (parts, output) if plain and alone <= set(output) else None


def stack(tensors: Sequence[Tensor], dim: int = 0, *, out: Tensor | None = None) -> Any:
    """`torch.stack` as a concatenation.

    >>> stack([torch.zeros(2), torch.ones(2)], dim=-1)
    tensor([[0., 1.],
            [0., 1.]])
    """
    return NotImplemented if out is not None else torch.cat([x.unsqueeze(dim) for x in tensors], dim)


def addmm(input: Tensor, *factors: Tensor, beta: float = 1, alpha: float = 1, **named: Tensor) -> Any:
    """`torch.addmm` and `torch.baddbmm` as a matrix product and a sum.

    >>> addmm(torch.ones(1), batch2=torch.full((1, 1), 2.0), batch1=torch.full((1, 1), 3.0))
    tensor([[7.]])
    """
    if beta not in (0, 1):
        return NotImplemented
    # mat1 and mat2, or batch1 and batch2, in whichever order they are named.
    first, second = (*factors, *(named[name] for name in sorted(named)))
    product = torch.matmul(first, second)
    product = product if alpha == 1 else product * alpha
    return product + input if beta else product


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """`F.glu`: one half times the sigmoid of the other.

    >>> x = torch.randn(3, 4)
    >>> torch.allclose(glu(x), F.glu(x))
    True
    """
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    torch.einsum: einsum,
    torch.stack: stack,
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), addmm),
    F.glu: glu,
}
"""What each function is made of."""
