"""The integer twins of quantised layers: what `isogrid.convert` puts in their places.

They hold codes and scales, no float weights, and compute with the operators of `isogrid.layers.operators`. Between them
travel float values that lie on a grid; each twin turns its input into codes and its output into values again,
which changes nothing and lets any float operation stand between them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.layers import kernel_operators, operators  # noqa: F401  define torch.ops.isogrid
from isogrid.layers.clamp import Clamp
from isogrid.layers.nbits import dequantize_matmul_nbits
from isogrid.layers.operations import ConvolutionOperation
from isogrid.layers.pooling import pooling_of

ops = torch.ops.isogrid


class StaticGrid(NamedTuple):
    """A per-tensor integer grid: float32 [1], zero point [1] in the codes' dtype, and the codes in use."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def clamped(self, clamp: Clamp | None) -> "StaticGrid":
        """The same grid for clamped values: ReLU leaves the codes from the zero point on."""
        if clamp is None:
            return self
        low, high = clamp.limits(self.scale, self.zero_point.to(torch.float32), self.low, self.high)
        return self._replace(low=int(low), high=int(high))


def uncounted() -> AbstractContextManager[None]:
    """While open, functions are none of the model's operations, which scopes around would count."""
    disabled: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return disabled


class IntegerModule(nn.Module):
    """Common ground: grids as buffers `<name>_scale` and `<name>_zero_point`, and a look at codes in passing.

    Attributes:
        watch: while set, called with the name and codes of each quantised input and output; forward goes on with the
            codes that it returns.
        kernels: how the runtime computes, by name; `isogrid.convert` writes the plan's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watch: Callable[[str, Tensor], Tensor] | None = None
        self.kernels = "onnxruntime"
        self.limits: dict[str, tuple[int, int]] = {}

    def add_grid(self, name: str, grid: StaticGrid) -> None:
        """Keep a grid under a name, which is also what exported graphs call its codes."""
        self.register_buffer(f"{name}_scale", grid.scale.detach().clone())
        self.register_buffer(f"{name}_zero_point", grid.zero_point.clone())
        self.limits[name] = (grid.low, grid.high)

    def grid(self, name: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a grid."""
        return getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero_point")

    def quantized(self, name: str, x: Tensor) -> Tensor:
        """Codes of a float tensor."""
        return self._watched(name, ops.quantize(x, *self.grid(name), *self.limits[name], self.kernels))

    def dequantized(self, name: str, codes: Tensor) -> Tensor:
        """Values of codes."""
        return ops.dequantize(self._watched(name, codes), *self.grid(name))  # type: ignore[no-any-return]

    def _watched(self, name: str, codes: Tensor) -> Tensor:
        if self.watch is None:
            return codes
        with uncounted():
            return self.watch(name, codes)

    def extra_repr(self) -> str:
        return ", ".join(f"{name} codes {low}..{high}" for name, (low, high) in self.limits.items())


class WeightOfCodes(nn.Module):
    """A module whose buffer `weight` holds codes, while its attribute `weight` reads as the values that they stand for.

    A forward may look at a layer's weight: to bring its input to the same dtype, or to multiply by it elsewhere.
    """

    def add_codes(self, codes: Tensor) -> None:
        """Keep the codes, under the name that the float weight has in a state_dict."""
        self._buffers["weight"] = codes

    @property
    def codes(self) -> Tensor:
        """The weight as it is stored."""
        codes = self._buffers["weight"]
        assert codes is not None
        return codes

    @property
    def weight(self) -> Tensor:
        """The values that the codes stand for, float32."""
        raise NotImplementedError


class IntegerLayer(WeightOfCodes, IntegerModule):
    """A layer with integer weights.

    Args:
        weight: int8 codes; weight_scale: float32 [channels].
        bias: int32 codes [channels] at input scale * weight_scale.
        input, output: grids; no output grid leaves the output float.
        clamp: of a float output, or None.
    """

    weight_scale: Tensor
    bias: Tensor

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor,
        input: StaticGrid,
        output: StaticGrid | None,
        clamp: Clamp | None = None,
    ) -> None:
        super().__init__()
        self.clamp = clamp
        self.add_codes(weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.add_grid("input", input)
        if output is not None:
            self.add_grid("output", output)

    @property
    def weight(self) -> Tensor:
        with uncounted():
            return self.codes.to(torch.float32) * self.weight_scale.reshape(-1, *[1] * (self.codes.dim() - 1))

    @property
    def has_output_grid(self) -> bool:
        """Whether the output is quantised."""
        return "output" in self.limits

    def clamped(self, y: Tensor) -> Tensor:
        """A float output within its bounds."""
        if self.clamp is None:
            return y
        with uncounted():
            return y.clamp(self.clamp.low, self.clamp.high)


class IntegerLinear(IntegerLayer):
    """Linear on codes, x [..., in] to [..., out]."""

    def forward(self, input: Tensor) -> Tensor:
        operands = (self.quantized("input", input), *self.grid("input"), self.codes, self.weight_scale, self.bias)
        if not self.has_output_grid:
            return self.clamped(ops.static_linear_float(*operands))
        return self.dequantized("output", ops.static_linear(*operands, *self.grid("output"), *self.limits["output"]))


class IntegerConvolution(IntegerLayer):
    """Convolution on codes over one to three dimensions.

    Args:
        operation: stride, padding, dilation and groups.
        edges: values to pad beforehand, as for torch.nn.functional.pad, and how; None where `operation` pads.
    """

    def __init__(self, operation: ConvolutionOperation, edges: tuple[list[int], str] | None, *args: Any) -> None:
        super().__init__(*args)
        self.operation, self.edges = operation, edges

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.edges is None else F.pad(input, self.edges[0], mode=self.edges[1])
        o = self.operation
        operands = (self.quantized("input", x), *self.grid("input"), self.codes, self.weight_scale, self.bias)
        geometry = (o.stride, o.padding, o.dilation, o.groups)
        if not self.has_output_grid:
            return self.clamped(ops.static_convolution_float(*operands, *geometry))
        codes = ops.static_convolution(*operands, *self.grid("output"), *geometry, *self.limits["output"])
        return self.dequantized("output", codes)


class IntegerSite(IntegerModule):
    """An operation of a forward on codes, computed by the kernels of this name."""

    def __init__(self, inputs: Sequence[StaticGrid], output: StaticGrid, kernels: str) -> None:
        super().__init__()
        self.kernels = kernels
        self.names = ["input"] if len(inputs) == 1 else [f"input{number}" for number in range(len(inputs))]
        for name, grid in zip(self.names, inputs, strict=True):
            self.add_grid(name, grid)
        self.add_grid("output", output)

    @property
    def ending(self) -> tuple[int, int, str]:
        """The last arguments of an operator: the output's codes in use, and the kernels."""
        return (*self.limits["output"], self.kernels)

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Called with the torch function and its arguments, like the site it replaces."""
        raise NotImplementedError


class IntegerAveragePool(IntegerSite):
    """Average pooling of codes."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        pooling = pooling_of(function, args[0], *args[1:], **kwargs)
        x = (self.quantized("input", args[0]), *self.grid("input"), *self.grid("output"))
        if pooling.kernel == tuple(args[0].shape[2:]) and not any(pooling.padding):
            codes = ops.static_global_average_pool(*x, *self.ending)
        else:
            window = (pooling.kernel, pooling.stride, pooling.padding, pooling.ceil_mode, pooling.count_include_pad)
            codes = ops.static_average_pool(*x, *window, *self.ending)
        values = self.dequantized("output", codes)
        return values if pooling.keeps_space else values.flatten(1)


class IntegerConcat(IntegerSite):
    """Concatenation of parts on one grid."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        parts = zip(self.names, args[0], strict=True)
        on_grid = [self.dequantized(name, self.quantized(name, part)) for name, part in parts]
        return function(on_grid, *args[1:], **kwargs)  # type: ignore[no-any-return]


class PackedLinear(WeightOfCodes):
    """Linear with a weight of 2, 4 or 8 bits in groups, float input and output; see `isogrid.layers.nbits`.

    Args:
        weight: uint8 [out, in / block, block * bits / 8]; weight_scale: float32 [out, in / block].
        bias: float32 [out] or None.
        bits, block: of the weight.
        accuracy_level: 1 for float activations, 4 for int8 ones that are quantised as they come.
    """

    weight_scale: Tensor

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int, block: int, accuracy_level: int
    ) -> None:
        super().__init__()
        self.add_codes(weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.bits, self.block, self.accuracy_level = bits, block, accuracy_level

    def forward(self, input: Tensor) -> Tensor:
        y = ops.matmul_nbits(
            input, self.codes, self.weight_scale, None, self.bias, self.bits, self.block, self.accuracy_level
        )
        return y  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        return dequantize_matmul_nbits(self.codes, self.weight_scale, None, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, block={self.block}, accuracy_level={self.accuracy_level}"


class IntegerEmbedding(WeightOfCodes):
    """Rows of codes, each with its scale; indices [...] to values [..., dimension].

    Args:
        weight: int8 codes [entries, dimension]; weight_scale: float32 [entries, groups].
    """

    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor) -> None:
        super().__init__()
        self.add_codes(weight)
        self.register_buffer("weight_scale", weight_scale)

    def forward(self, input: Tensor) -> Tensor:
        return _of_groups(F.embedding(input, self.codes), F.embedding(input, self.weight_scale))

    @property
    def weight(self) -> Tensor:
        return _of_groups(self.codes, self.weight_scale)


def _of_groups(codes: Tensor, scale: Tensor) -> Tensor:
    with uncounted():
        groups = codes.reshape(*scale.shape, -1).to(torch.float32)
        return (groups * scale.unsqueeze(-1)).flatten(-2)
