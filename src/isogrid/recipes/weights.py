"""The weights of a prepared model as their codes see them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.formats import Quantized
from isogrid.layers.weights import weight_of
from isogrid.planning.state import weight_quantizers
from isogrid.quantizers import Quantizer
from isogrid.quantizers.functional import saturation


@dataclass(frozen=True)
class StoredWeight:
    """One weight, and what its codes make of it.

    Attributes:
        layer: path of the layer.
        weight: float32; channels whose batch norm has a negative factor are negated, as they are before rounding.
        quantized: codes and scale.
        quantizer: of the layer.
    """

    layer: str
    weight: Tensor
    quantized: Quantized
    quantizer: Quantizer

    def sqnr_db(self) -> float:
        """Signal to quantisation noise in dB; infinite where the codes hold the weight exactly."""
        noise = (self.weight - self.quantized.dequantize()).square().sum()
        ratio = self.weight.square().sum() / noise
        return 10 * math.log10(float(ratio)) if 0 < ratio < math.inf else math.inf

    def saturation(self) -> float:
        """Share of the weights that lie beyond an end of the grid by more than rounding explains, in [0, 1]."""
        fmt, affine = self.quantizer.format, self.quantized.affine
        if fmt.grid.dimension > 1 or affine.scale is None:
            return 0.0
        return saturation(self.weight, fmt, affine)


@torch.no_grad()
def stored_weights(model: nn.Module) -> Iterator[StoredWeight]:
    """Every quantised weight of a prepared model, as it is now.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> model = ig.prepare(model, ig.plan(model, scheme="w8a8", example_inputs=(torch.zeros(1, 4),)))
    >>> [(weight.layer, weight.quantized.codes.dtype) for weight in stored_weights(model)]
    [('0', torch.int8)]
    """
    for name in weight_quantizers(model):
        path = name.rpartition(".")[0]
        layer: Any = model.get_submodule(path)
        weight = weight_of(layer).detach().float()
        batch_norm = getattr(layer, "batch_norm", None)
        if batch_norm is not None and batch_norm.weight is not None:
            sign = torch.where(batch_norm.weight.detach() < 0, -1.0, 1.0)
            weight = weight * sign.reshape(-1, *[1] * (weight.dim() - 1))
        yield StoredWeight(path, weight, layer.weight_quantizer.quantize(weight), layer.weight_quantizer)
