"""A Linear whose weight is frozen as codes, so that nothing but its scales, and adapters beside it, can train."""

import torch
from torch import Tensor, nn

from isogrid.errors import PlanError
from isogrid.formats import Affine, Quantized
from isogrid.formats.coded import pack_codes, packed_dtype, packed_shape, unpack_codes
from isogrid.layers.adapters import adapters_of
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
        fmt, stored = self.weight_quantizer.format, self.affine()
        parts = zip((fmt.scale, fmt.zero_point, fmt.offset), stored, strict=True)
        codes = unpack_codes(self.codes, fmt, self.coded.shape)
        kept = [None if part is None or x is None else part.quantize(x.detach()) for part, x in parts]
        return Quantized(codes, fmt, self.coded.shape, *kept)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # there is nothing to assign to
        with uncounted():
            return self.quantized.dequantize()

    def affine(self) -> Affine:
        """Scale, zero point and offset before they are stored, with what adapters add to the groups (QA-LoRA).

        The values of a group move by `s·BA`, one number for each row and group: an offset by as much, a zero point by
        as much in steps (Xu et al., arXiv 2309.14717).
        """
        affine = self.weight_quantizer.affine()
        adapters = adapters_of(self)
        shift = None if adapters is None else adapters.shift()
        if shift is None or affine.scale is None:
            return affine
        shift = shift.reshape(affine.scale.shape)
        if affine.offset is not None:
            return affine._replace(offset=affine.offset + shift)
        assert affine.zero_point is not None
        return affine._replace(zero_point=affine.zero_point - shift / affine.scale.detach())

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        adapters = adapters_of(self)
        if adapters is None or not adapters.stands_beside:
            return y
        with torch._C.DisableTorchFunction():
            return adapters.beside(input, y)

    def quantized_weight(self) -> Quantized:
        adapters = adapters_of(self)
        if adapters is not None and adapters.stands_beside:
            raise PlanError(
                "An adapter stands beside a quantised weight (QLoRA), and no grid holds their sum. Call "
                "isogrid.merge_adapters(model), which quantises it anew; isogrid.merge_difference(model, batches) "
                "measures what that changes. Adapters with method='l4q' need neither."
            )
        return self.quantized

    def base_operands(self) -> tuple[Tensor, Tensor | None]:
        return self.codes, self.bias

    def operands(self) -> tuple[Tensor, Tensor | None]:
        return self.base_operands()

    def weight_operand(self, weight: Tensor) -> Operand | None:
        quantizer = self.weight_quantizer
        return Operand(quantizer.format, quantizer.estimator, self.affine(), {}, coded=self.coded)

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
    weight, fmt = weight_of(layer).detach(), layer.weight_quantizer.format
    if weight.is_meta:  # a place for codes that are still on disk
        codes = torch.empty(packed_shape(fmt, tuple(weight.shape)), dtype=packed_dtype(fmt), device="meta")
    else:
        codes = pack_codes(layer.weight_quantizer.quantize(weight).codes, fmt)
    new = replacement(layer, CodedLinear)
    new._parameters = {name: parameter for name, parameter in layer._parameters.items() if name != "weight"}
    new._buffers = dict(layer._buffers)
    new.coded = Coded(tuple(weight.shape), weight.dtype)
    new.add_codes(codes)
    if new.weight_quantizer.zero_point is not None:
        new.weight_quantizer.zero_point.requires_grad_(False)
    return new


@torch.no_grad()
def decoded(layer: CodedLinear, weight: Tensor) -> QuantizedLinear:
    """The layer with a float weight again, and the range that fits it."""
    new = replacement(layer, QuantizedLinear)
    new._parameters = {"weight": nn.Parameter(weight.to(layer.coded.dtype)), **layer._parameters}
    new._buffers = {name: buffer for name, buffer in layer._buffers.items() if name != "weight"}
    del new.coded
    new.weight_quantizer.fit(new.weight)
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
