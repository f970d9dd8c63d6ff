"""Layers of `isogrid.convert` for runtimes that compute in float on weights stored in any format."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.formats import Format, Quantized
from isogrid.formats.granularity import Shape
from isogrid.layers.activation_rule import ActivationRule
from isogrid.layers.integer import WeightOfCodes, uncounted

PARTS = ("scale", "zero_point", "offset")


class StoredWeight(WeightOfCodes):
    """A module that holds a weight as a runtime stores it.

    Its buffers are the codes, `weight`, and those of what they are made of: `weight_scale`, `weight_offset`, and where
    scales are codes themselves `weight_scale_scale`. Writers of artefacts read `quantized` and pack it.

    Args:
        quantized: the weight [...], in any format.
    """

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.format, self.shape = quantized.format, quantized.shape
        self.add_codes(quantized.codes.contiguous())
        for path, codes in _parts(quantized):
            self.register_buffer("_".join(("weight", *path)), codes.contiguous())

    @property
    def quantized(self) -> Quantized:
        """The weight: codes, scale, zero point and offset as they are stored."""
        return self._assembled(self.format, self.shape, "weight")

    @property
    def weight(self) -> Tensor:
        with uncounted():
            return self.quantized.dequantize()

    def _assembled(self, fmt: Format, shape: Shape, name: str) -> Quantized:
        parts: dict[str, Any] = {}
        for part in PARTS:
            inner: Format | None = getattr(fmt, part)
            if inner is not None:
                parts[part] = self._assembled(inner, fmt.scale_shape(shape), f"{name}_{part}")
        codes = self._buffers[name]
        assert codes is not None
        return Quantized(codes, fmt, shape, **parts)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, weight={self.format}"


class StoredLinear(StoredWeight):
    """Linear, x [..., in] to [..., out] in x's dtype, with a stored weight [out, in].

    Args:
        quantized: the weight.
        bias: float32 [out] or None.
        activation_rule: what the runtime does to x, or None where it stays float.
    """

    bias: Tensor | None

    def __init__(self, quantized: Quantized, bias: Tensor | None, activation_rule: ActivationRule | None) -> None:
        super().__init__(quantized)
        self.register_buffer("bias", bias)
        self.activation_rule = activation_rule

    def forward(self, input: Tensor) -> Tensor:
        with uncounted():
            weight = self.quantized
            return stored_linear(input, weight.dequantize(), weight.affine.offset, self.bias, self.activation_rule)

    def extra_repr(self) -> str:
        rule = "float" if self.activation_rule is None else self.activation_rule.name
        return f"{super().extra_repr()}, activations={rule}"


class StoredEmbedding(StoredWeight):
    """Rows of a stored table [entries, dimension]; indices [...] to [..., dimension].

    Args:
        quantized: the table.
        dtype: of the model, and so of the rows.
    """

    def __init__(self, quantized: Quantized, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(quantized)
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        with uncounted():
            return F.embedding(input, self.quantized.dequantize().to(self.dtype))


def stored_linear(
    x: Tensor, weight: Tensor, offset: Tensor | None, bias: Tensor | None, rule: ActivationRule | None
) -> Tensor:
    """`x^ @ weight.T + bias` in x's dtype, with x^ as a rule has it.

    Args:
        x: float [..., in].
        weight: float32 [out, in], the values that the codes stand for.
        offset: float32 [out, blocks] that is contained in them, or None.
        bias: float32 [out] or None.
        rule: None leaves x float.
    """
    bias = None if bias is None else bias.to(x.dtype)
    y = F.linear(x if rule is None else rule(x), weight.to(x.dtype), bias)
    return y if rule is None or offset is None else with_stored_sums(y, x, offset, rule)


def with_stored_sums(y: Tensor, x: Tensor, offset: Tensor, rule: ActivationRule) -> Tensor:
    """A product by a weight with offsets, where the runtime multiplies these by sums that it has stored of x.

    Args:
        y: [..., out], the product with the values of x.
        x: float [..., in].
        offset: float32 [out, blocks].
        rule: of x; where it stores no sums, y is the result.
    """
    error = rule.sum_error(x.detach())
    return y if error is None else y + F.linear(error, offset.detach()).to(y.dtype)


def _parts(quantized: Quantized, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Codes of scale, zero point and offset, and of what these are made of, by their paths."""
    for part in PARTS:
        inner: Quantized | None = getattr(quantized, part)
        if inner is not None:
            yield (*path, part), inner.codes
            yield from _parts(inner, (*path, part))

