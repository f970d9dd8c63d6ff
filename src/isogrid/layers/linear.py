"""The quantised Linear."""

import torch
from torch import nn

from isogrid.formats import PerGroup
from isogrid.layers.bitnet import TernaryLinear, is_ternary
from isogrid.layers.bitnet_activations import BitNetActivations
from isogrid.layers.integer import IntegerLinear, PackedLinear
from isogrid.layers.layer import QuantizedLayer
from isogrid.layers.nbits import pack_matmul_nbits
from isogrid.layers.operations import BilinearOperation, LinearOperation
from isogrid.layers.stored import StoredLinear


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """torch.nn.Linear with quantised weight, input and output; made by `isogrid.prepare`.

    x [..., in_features] to [..., out_features]; float32 where the arithmetic is static.
    """

    @property
    def operation(self) -> BilinearOperation:
        return LinearOperation()

    def to_integer(self) -> nn.Module:
        if self.arithmetic == "half":
            return self.to_half()
        if self.arithmetic == "float":
            return self._packed() if self.packs_nbits else self._stored()
        return IntegerLinear(*self.integer_parts())

    @torch.no_grad()
    def _stored(self) -> nn.Module:
        stored = self.to_stored(StoredLinear)
        if isinstance(self.input_rule, BitNetActivations) and is_ternary(stored.quantized):
            return TernaryLinear(stored.quantized, stored.bias)
        return stored

    @torch.no_grad()
    def _packed(self) -> nn.Module:
        quantized = self.quantized_weight()
        grid, granularity = quantized.format.grid, quantized.format.granularity
        scale = quantized.affine.scale
        assert scale is not None and isinstance(granularity, PerGroup)
        bits = int(grid.bits)
        bias = None if self.bias is None else self.bias.detach().to(torch.float32)
        packed = pack_matmul_nbits(quantized.codes.to(torch.int8), bits, granularity.size)
        return PackedLinear(packed, scale, bias, bits, granularity.size, 1 if self.input_rule is None else 4)
