"""Layers of `isogrid.convert` for runtimes that compute in float on weights stored in any format."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.formats import Affine, Format, Quantized
from isogrid.formats.granularity import Shape
from isogrid.layers.activation_rule import ActivationRule
from isogrid.layers.integer import WeightOfCodes, uncounted
from isogrid.layers.operations import BilinearOperation, LinearOperation

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
        for path, codes in parts_of(quantized):
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


class StoredInput(nn.Module):
    """The grid of an input that is quantised before it is multiplied.

    Its buffers are the scale and the zero point as they are stored.

    Args:
        fmt: of the input, with one scale for all of it.
        affine: scale and zero point, [1].
    """

    scale: Tensor

    def __init__(self, fmt: Format, affine: Affine) -> None:
        super().__init__()
        self.format = fmt
        for name, part in zip(("scale", "zero_point"), affine, strict=False):
            self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """x [...] on the grid, in its dtype."""
        scale, zero_point = (
            None if part is None else part.reshape(self.format.scale_shape(tuple(x.shape)))
            for part in (self.scale, self._buffers["zero_point"])
        )
        return self.format.nearest(x, Affine(scale, zero_point)).to(x.dtype)

    def extra_repr(self) -> str:
        return str(self.format)


class StoredLinear(StoredWeight):
    """Linear, x [..., in] to [..., out] in x's dtype, with a stored weight [out, in].

    Args:
        quantized: the weight.
        bias: [out] or None.
        activation_rule: what the runtime does to x as it comes, or None.
        input: the grid of x, where it has one, or None.
    """

    bias: Tensor | None

    def __init__(
        self,
        quantized: Quantized,
        bias: Tensor | None,
        activation_rule: ActivationRule | None = None,
        input: StoredInput | None = None,
    ) -> None:
        super().__init__(quantized)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.activation_rule, self.input = activation_rule, input

    @property
    def activations(self) -> str:
        """The name of the rule or of the format of x, or `float`."""
        if self.input is not None:
            return str(self.input.format)
        return "float" if self.activation_rule is None else self.activation_rule.name

    def forward(self, input: Tensor) -> Tensor:
        with uncounted():
            return self.compute(input, LinearOperation())

    def compute(self, x: Tensor, operation: BilinearOperation) -> Tensor:
        """The product, by an operation whose geometry may differ from call to call."""
        quantized, rule = self.quantized, self.activation_rule
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = operation.forward(self.rounded(x), quantized.dequantize().to(x.dtype), bias)
        offset = quantized.affine.offset
        return y if rule is None or offset is None else with_stored_sums(y, x, offset, rule, operation)

    def rounded(self, x: Tensor) -> Tensor:
        """x as the runtime multiplies it."""
        x = x if self.input is None else self.input(x)
        return x if self.activation_rule is None else self.activation_rule(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activations={self.activations}"


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


def with_stored_sums(
    y: Tensor, x: Tensor, offset: Tensor, rule: ActivationRule, operation: BilinearOperation
) -> Tensor:
    """A product by a weight with offsets, where the runtime multiplies these by sums that it has stored of x.

    Args:
        y: [..., out], the product with the values of x.
        x: float [..., in].
        offset: float32 [out, blocks].
        rule: of x; where it stores no sums, y is the result.
        operation: the product.
    """
    error = rule.sum_error(x.detach())
    return y if error is None else y + operation.forward(error, offset.detach(), None).to(y.dtype)


def parts_of(quantized: Quantized, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Codes of scale, zero point and offset, and of what these are made of, by their paths."""
    for part in PARTS:
        inner: Quantized | None = getattr(quantized, part)
        if inner is not None:
            yield (*path, part), inner.codes
            yield from parts_of(inner, (*path, part))
