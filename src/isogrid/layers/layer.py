"""What all quantised layers with a weight share."""

from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from isogrid.formats import Format, NativeGrid, Quantized, named_format
from isogrid.layers import arithmetic
from isogrid.layers.activation_rule import ActivationRule
from isogrid.layers.adapters import made_of
from isogrid.layers.batch_norm import AbsorbedBatchNorm
from isogrid.layers.clamp import Clamp
from isogrid.layers.folding import Folded, fold
from isogrid.layers.half import Edges, HalfLayer, half_product
from isogrid.layers.integer import StaticGrid
from isogrid.layers.operations import BilinearOperation
from isogrid.layers.static import Finish, static_operation
from isogrid.layers.stored import StoredInput, StoredLinear, with_stored_sums
from isogrid.layers.weights import base_of
from isogrid.quantizers import Operand, Quantizer, fake_quantize, quantized_operation
from isogrid.quantizers.sources import make

Arithmetic = Literal["static", "float", "half"]
"""`static`: whole codes are accumulated and rescaled once. `float`: floating point on dequantised operands. `half`:
input, weight, bias and output are float16."""

Module = TypeVar("Module", bound=nn.Module)


def link(module: nn.Module, name: str, other: nn.Module | None) -> None:
    """Give a module an attribute that refers to another one without owning it, so that it is registered once.

    Deep copies keep the reference inside the copy.
    """
    object.__setattr__(module, name, other)


def replacement(module: nn.Module, kind: type[Module]) -> Module:
    """A module of another class with everything the first one has: parameters, buffers, hooks, attributes, flags."""
    new = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    return new


class QuantizedLayer(nn.Module):
    """Mixin of layers whose weight and input are quantised, with batch norm and clamp inside.

    Attributes:
        weight_quantizer: owned.
        input_quantizer: owned, or the quantizer of whatever produced the input, or None.
        output_quantizer: None where the output stays float.
        batch_norm: the absorbed batch norm that follows, or None.
        clamp: of the output before it is quantised, or None.
        arithmetic: how the target computes.
        input_on_grid: the input is already quantised by whatever produced it.
        input_rule: how the runtime quantises the input as it comes, or None.
        packs_nbits: float arithmetic is ONNX Runtime's MatMulNBits.
    """

    weight: Any
    bias: Any
    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    output_quantizer: Quantizer | None
    batch_norm: AbsorbedBatchNorm | None
    clamp: Clamp | None
    arithmetic: Arithmetic
    input_on_grid: bool
    input_rule: ActivationRule | None
    packs_nbits: bool

    @property
    def operation(self) -> BilinearOperation:
        """The float operation of this layer."""
        raise NotImplementedError

    def base_operands(self) -> tuple[Tensor, Tensor | None]:
        """Weight without adapters, output channels first, and bias of `operation`, before quantisation."""
        return base_of(self), self.bias

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Weight with its adapters, output channels first, and bias of `operation`, before quantisation."""
        weight, bias = self.base_operands()
        made = made_of(self)
        return weight if made is None else make(weight, made), bias

    def weight_operand(self, weight: Tensor) -> Operand | None:
        """How the weight, as `base_operands` has it, is made and quantised now."""
        return self.weight_quantizer.operand(weight, made=made_of(self))

    def quantized_weight(self) -> Quantized:
        """The weight as deployment stores it."""
        return self.weight_quantizer.quantize(self.operands()[0])

    def arrange_input(self, x: Tensor) -> Tensor:
        """The input as `operation` takes it: padded, where the padding is not with zeros on equal sides."""
        return x

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output as the runtime computes it, with the gradient of its estimators."""
        # Operations in here are not those of the model, so that no operation scope around may count them.
        with torch._C.DisableTorchFunction():
            return self.compute(input, self.operation)

    def compute(
        self, x: Tensor, operation: BilinearOperation, operands: tuple[Tensor, Tensor | None] | None = None
    ) -> Tensor:
        """`forward` by an operation whose geometry may differ from call to call, and by given operands.

        The weight among them is without adapters, which are added where it is quantised.
        """
        weight, bias = self.base_operands() if operands is None else operands
        made = made_of(self)
        if self.input_quantizer is not None and not self.input_on_grid:
            self.input_quantizer.observe(x)
        x = self.arrange_input(x)
        x_operand = self.input_quantizer.operand(x, self.input_on_grid) if self.input_quantizer is not None else None
        if self.input_rule is not None and self.weight_quantizer.enabled:
            x_operand = self.input_rule.operand._replace(strength=self.weight_quantizer.strength_now)
        weight_operand = self.weight_operand(weight)
        if weight_operand is None and made is not None:
            weight = make(weight, made)
        if self.arithmetic == "half" and weight_operand is not None:
            return half_product(operation, x, fake_quantize(weight, weight_operand), bias)
        if self._computes_static(x_operand, weight_operand):
            assert x_operand is not None and weight_operand is not None
            return self._static_forward(operation, x, weight, bias, x_operand, weight_operand)
        if self.batch_norm is not None and weight_operand is not None:
            weight_operand = self._with_sign(weight_operand)
        if x_operand is None and weight_operand is None:
            y = operation.forward(x, weight, bias)
        else:
            y = quantized_operation(operation, x, weight, bias, x_operand, weight_operand)
            y = self._with_stored_sums(y, x, weight_operand, operation)
        if self.batch_norm is not None:
            y = self.batch_norm.normalize(y)
        y = y if self.clamp is None else self.clamp(y)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def _with_stored_sums(
        self, y: Tensor, x: Tensor, weight_operand: Operand | None, operation: BilinearOperation
    ) -> Tensor:
        """The output y of the float arithmetic, with what the runtime's sums of its input differ."""
        if self.input_rule is None or weight_operand is None or weight_operand.affine.offset is None:
            return y
        offset = weight_operand.format.stored(weight_operand.affine).offset
        assert offset is not None
        return with_stored_sums(y, x, offset, self.input_rule, operation)

    def _computes_static(self, x_operand: Operand | None, weight_operand: Operand | None) -> bool:
        if self.arithmetic != "static" or x_operand is None or weight_operand is None:
            return False
        live = self.batch_norm is not None and self.batch_norm.is_live
        observing = self.output_quantizer is not None and not self.output_quantizer.enabled
        return not live and not observing and x_operand.strength is None and weight_operand.strength is None

    def _static_forward(
        self,
        operation: BilinearOperation,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_operand: Operand,
        weight_operand: Operand,
    ) -> Tensor:
        weight_scale, x_scale = weight_operand.affine.scale, x_operand.format.stored(x_operand.affine).scale
        assert weight_scale is not None and x_scale is not None
        folded = self._folded(weight_scale, x_scale, len(weight), bias)
        signed = weight_scale * _like_channels(folded.weight_factor, weight)
        weight_operand = _with_scale(weight_operand, signed)
        x_scale = x_scale.detach()
        quantizer = self.output_quantizer
        finish = Finish(
            *self._float_twin(x_scale * signed.detach().reshape(-1).expand(len(weight)), bias),
            bias_codes=arithmetic.quantize_bias(folded.shift, x_scale, folded.scale),
            step=x_scale * folded.scale,
            clamp=self.clamp,
            output=None if quantizer is None else quantizer.operand(x),
            watch=None if quantizer is None or not quantizer.follows else quantizer.observed_operand,
        )
        return static_operation(operation, x, weight, x_operand, weight_operand, finish)

    def _float_twin(self, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Factor and shift [channels] from accumulator to float output, batch norm by its running statistics included.

        Unlike those of deployment they carry gradients, to the bias and to the affine part of batch norm.
        """
        shift = torch.zeros_like(scale) if bias is None else bias.to(torch.float32)
        norm: Any = self.batch_norm
        if norm is None:
            return scale, shift
        gain = torch.rsqrt(norm.running_var + norm.eps)
        gain = gain if norm.weight is None else gain * norm.weight
        shift = (shift - norm.running_mean) * gain
        return scale * gain, shift if norm.bias is None else shift + norm.bias

    def folded(self, weight_scale: Tensor, x_scale: Tensor) -> Folded:
        """Scales and shift of the layer with its batch norm folded in, [channels]."""
        weight, bias = self.operands()
        return self._folded(weight_scale, x_scale, len(weight), bias)

    def _folded(self, weight_scale: Tensor, x_scale: Tensor, channels: int, bias: Tensor | None) -> Folded:
        per_channel = weight_scale.detach().reshape(-1).expand(channels)
        norm: Any = self.batch_norm
        fmt: Any = self.weight_quantizer.format
        return fold(per_channel, x_scale, bias, norm, None if _stores_float32(fmt) else fmt.scale.grid)

    @torch.no_grad()
    def integer_parts(self) -> tuple[Tensor, Tensor, Tensor, StaticGrid, StaticGrid | None, Clamp | None]:
        """Weight codes, folded scale, bias codes, input and output grid, and the clamp of a float output."""
        assert self.input_quantizer is not None
        input_grid = static_grid(self.input_quantizer)
        weight, shift = self.operands()
        weight_scale = self.weight_quantizer.affine(weight).scale
        assert weight_scale is not None
        folded = self._folded(weight_scale, input_grid.scale, len(weight), shift)
        signed = weight_scale * _like_channels(folded.weight_factor, weight)
        grid: Any = self.weight_quantizer.format.grid
        codes = grid.round(weight / signed).to(torch.int8)
        bias = arithmetic.quantize_bias(folded.shift, input_grid.scale, folded.scale)
        if self.output_quantizer is None:
            return codes, folded.scale.clone(), bias, input_grid, None, self.clamp
        output = static_grid(self.output_quantizer).clamped(self.clamp)
        return codes, folded.scale.clone(), bias, input_grid, output, None

    def to_integer(self) -> nn.Module:
        """The layer that computes on codes."""
        raise NotImplementedError

    @torch.no_grad()
    def to_stored(self, kind: type[StoredLinear]) -> StoredLinear:
        """The layer that computes in float on its weight as it is stored."""
        quantizer = self.input_quantizer
        grid = None if quantizer is None else StoredInput(quantizer.format, quantizer.stored())
        return kind(self.quantized_weight(), self.operands()[1], self.input_rule, grid)

    @torch.no_grad()
    def to_half(self, edges: Edges | None = None) -> HalfLayer:
        """The layer in float16."""
        return HalfLayer(self.quantized_weight(), self.operands()[1], self.operation, edges)

    def _with_sign(self, operand: Operand) -> Operand:
        gain: Any = self.batch_norm.weight if self.batch_norm is not None else None
        if gain is None or operand.affine.scale is None:
            return operand
        sign = _like_channels(torch.where(gain.detach() < 0, -1.0, 1.0), operand.affine.scale)
        stored = operand.format.stored(operand.affine).scale
        assert stored is not None
        return _with_scale(operand, (operand.affine.scale + (stored - operand.affine.scale).detach()) * sign)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"weight={self.weight_quantizer.format}"]
        for name in ("input", "output"):
            quantizer = getattr(self, f"{name}_quantizer")
            otherwise = "float16" if self.arithmetic == "half" else "float"
            parts.append(f"{name}={quantizer.format if quantizer is not None else otherwise}")
        if self.clamp is not None:
            parts.append(str(self.clamp))
        return ", ".join(part for part in parts if part)


def _with_scale(operand: Operand, scale: Tensor) -> Operand:
    """A weight's operand with a scale that is taken as it is, whatever its format stores."""
    fmt = operand.format
    fmt = fmt if _stores_float32(fmt) else replace(fmt, scale=named_format("float32"))
    return operand._replace(format=fmt, affine=operand.affine._replace(scale=scale))


def _stores_float32(fmt: Format) -> bool:
    return fmt.scale is None or fmt.scale.grid == NativeGrid(torch.float32)


def _like_channels(per_channel: Tensor, weight: Tensor) -> Tensor:
    """A vector over output channels in the view in which it broadcasts against a weight."""
    return per_channel.reshape(-1, *[1] * (weight.dim() - 1))


def static_grid(quantizer: Quantizer) -> StaticGrid:
    """A calibrated per-tensor quantizer's grid as integer layers hold it."""
    grid: Any = quantizer.format.grid
    affine = quantizer.stored()
    assert affine.scale is not None
    zero_point = torch.zeros_like(affine.scale) if affine.zero_point is None else affine.zero_point
    return StaticGrid(affine.scale.reshape(1), zero_point.reshape(1).to(grid.code_dtype), grid.low, grid.high)
