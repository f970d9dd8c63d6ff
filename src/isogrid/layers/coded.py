"""A Linear whose weight is frozen as codes, so that nothing but its scales can train."""

import torch
from torch import Tensor, nn

from isogrid.errors import PlanError
from isogrid.formats import Quantized
from isogrid.formats.coded import pack_codes, unpack_codes
from isogrid.layers.integer import WeightOfCodes, uncounted
from isogrid.layers.layer import replacement
from isogrid.layers.linear import QuantizedLinear
from isogrid.layers.weights import weight_of
from isogrid.quantizers import Operand
from isogrid.quantizers.functional import Coded


class CodedLinear(WeightOfCodes, QuantizedLinear):
    """A quantised Linear without its float weight: codes in bytes, and scales that train; of `isogrid.freeze_codes`.

    What it computes is what the layer computed before, bit for bit. Its buffer `weight` holds the codes, several to a
    byte; its attribute `weight` reads as the values that they stand for, float32.

    Attributes:
        coded: shape and dtype of the weight that was.
    """

    coded: Coded

    @property
    def quantized(self) -> Quantized:
        """The weight as an artefact stores it."""
        fmt, stored = self.weight_quantizer.format, self.weight_quantizer.affine()
        parts = zip((fmt.scale, fmt.zero_point, fmt.offset), stored, strict=True)
        codes = unpack_codes(self.codes, fmt, self.coded.shape)
        kept = [None if part is None or x is None else part.quantize(x.detach()) for part, x in parts]
        return Quantized(codes, fmt, self.coded.shape, *kept)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # there is nothing to assign to
        with uncounted():
            return self.quantized.dequantize()

    def quantized_weight(self) -> Quantized:
        return self.quantized

    def base_operands(self) -> tuple[Tensor, Tensor | None]:
        return self.codes, self.bias

    def weight_operand(self, weight: Tensor) -> Operand | None:
        quantizer = self.weight_quantizer
        return Operand(quantizer.format, quantizer.estimator, quantizer.affine(), {}, coded=self.coded)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, codes frozen"


def coded(layer: QuantizedLinear) -> CodedLinear:
    """A prepared Linear with its weight as codes; its weight's zero points stop training.

    Raises:
        PlanError: the layer computes on integers, or is of another kind.
        NotCalibratedError: it has no range yet.
    """
    reason = why_not_coded(layer)
    if reason is not None:
        raise PlanError(f"The weight of a {type(layer).__name__} cannot be kept as codes alone: {reason}.")
    with torch.no_grad():
        weight = weight_of(layer)
        quantized = layer.weight_quantizer.quantize(weight)
    new = replacement(layer, CodedLinear)
    new._parameters = {name: parameter for name, parameter in layer._parameters.items() if name != "weight"}
    new._buffers = dict(layer._buffers)
    new.coded = Coded(tuple(weight.shape), weight.dtype)
    new.add_codes(pack_codes(quantized.codes, quantized.format))
    if new.weight_quantizer.zero_point is not None:
        new.weight_quantizer.zero_point.requires_grad_(False)
    return new


def why_not_coded(layer: nn.Module) -> str | None:
    """Why a layer's weight cannot be kept as codes alone; None where it can."""
    if type(layer) is not QuantizedLinear:
        return "only a prepared torch.nn.Linear can"
    if layer.arithmetic == "static":
        return "its arithmetic is on integers, whose scales follow the activations"
    if "weight" not in layer._parameters:
        return "its weight is computed from other parameters"
    if layer.weight_quantizer.format.grid.dimension > 1:
        return "its codes stand for several values each"
    if not layer.weight_quantizer.estimator.rounds_to_nearest:
        return "its estimator rounds by a rule of its own"
    return None
