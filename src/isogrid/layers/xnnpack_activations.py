"""What XNNPACK does to the input of a linear layer with int8 or int4 weights and float activations (qd8).

Written after `xnn_f32_qd8_asymmetric_quantization_params` in its src/xnnpack/quantization.h and its conversion of
float32 to qd8: every row is stored in int8 on a scale and a zero point of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.formats import PerToken
from isogrid.formats.granularity import Granularity
from isogrid.layers.activation_rule import ActivationRule

LOW, HIGH = -128.0, 127.0


def qd8_codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole codes float32 [..., K] in -128..127, scale and zero point float32 [..., 1] of rows.

    With the smallest and the largest value of a row, both including 0:

        factor = f32(255 / f32(largest - smallest))
        zero_point = rint(clamp(-128 - f32(smallest * factor))), or of 127 - f32(largest * factor), the closer of both
        codes = clamp(rint(f32(x * factor)) + zero_point)
        scale = f32(1 / factor)

    >>> codes, scale, zero_point = qd8_codes(torch.tensor([[-1.0, 0.0, 1.55]]))
    >>> codes, zero_point
    (tensor([[-128.,  -28.,  127.]]), tensor([[-28.]]))
    """
    x = x.float()
    smallest = x.amin(-1, keepdim=True).clamp(max=0.0)
    largest = x.amax(-1, keepdim=True).clamp(min=0.0)
    flat = smallest == largest
    width = torch.where(flat, 1.0, largest - smallest)
    factor = torch.where(flat, 1.0, torch.full_like(width, HIGH - LOW) / width)
    below, above = smallest * factor, largest * factor
    zero_point = torch.where((LOW + below) + (HIGH + above) > 0, LOW - below, HIGH - above)
    zero_point = torch.round(zero_point.clamp(LOW, HIGH))
    codes = (torch.round(x * factor) + zero_point).clamp(LOW, HIGH)
    return codes, 1 / factor, zero_point


@dataclass(frozen=True)
class Qd8(ActivationRule):
    """int8 rows with a zero point each, as XNNPACK quantises them for int8 and int4 weights.

    >>> Qd8()(torch.tensor([[0.0, 0.5, 2.55]]))
    tensor([[0.0000, 0.5000, 2.5500]])
    """

    @property
    def name(self) -> str:
        return "qd8"

    @property
    def granularity(self) -> Granularity:
        return PerToken()

    def values(self, x: Tensor) -> Tensor:
        codes, scale, zero_point = qd8_codes(x)
        return (codes - zero_point) * scale
