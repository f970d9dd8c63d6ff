"""Linear layers whose input a runtime quantises as it comes, as `quantized_decomposed` operators.

The form that ExecuTorch's partitioner takes for one kernel of XNNPACK: rows that are quantised on parameters chosen
from themselves, and a weight of int8 or int4 codes that is dequantised by channel or group. What these operators
compute in torch itself is not what the kernel computes; `isogrid.layers.xnnpack_activations` is.
"""

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.formats import PerGroup
from isogrid.layers.stored import StoredLinear

decomposed: Any = torch.ops.quantized_decomposed


class DynamicLinear(nn.Module):
    """A stored linear layer in decomposed operators."""

    def __init__(self, layer: StoredLinear):
        super().__init__()
        quantized = layer.quantized
        granularity, grid = quantized.format.granularity, quantized.format.grid
        scale = quantized.affine.scale
        assert scale is not None
        self.limits = (int(grid.lowest), int(grid.highest))
        self.group = granularity.size if isinstance(granularity, PerGroup) else 0
        scales = scale.reshape(len(quantized.codes), -1) if self.group else scale.reshape(-1)
        self.register_buffer("weight", quantized.codes.to(torch.int8))
        self.register_buffer("weight_scales", scales.to(torch.float32))
        self.register_buffer("weight_zero_points", torch.zeros_like(scales, dtype=torch.int64))
        self.register_buffer("bias", layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        scale, zero_point = decomposed.choose_qparams_per_token_asymmetric(input, torch.int8)
        row = (scale, zero_point, -128, 127, torch.int8)
        codes = decomposed.quantize_per_token(input, *row)
        x = decomposed.dequantize_per_token(codes, *row, torch.float32)
        grids = (self.weight_scales, self.weight_zero_points)
        if self.group:
            limits = (*self.limits, torch.int8, self.group, torch.float32)
            weight = decomposed.dequantize_per_channel_group(self.weight, *grids, *limits)
        else:
            weight = decomposed.dequantize_per_channel(self.weight, *grids, 0, *self.limits, torch.int8)
        return F.linear(x, weight, self.get_buffer("bias") if self._buffers["bias"] is not None else None)


def dynamic_form(module: nn.Module) -> nn.Module | None:
    """A stored linear layer in decomposed operators; None for other modules."""
    return DynamicLinear(module) if isinstance(module, StoredLinear) else None
