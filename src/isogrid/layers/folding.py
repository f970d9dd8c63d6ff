"""Batch norm inside an integer layer.

A layer with batch norm quantises its own weight, not the folded one: batch norm multiplies each output channel,
so folding multiplies the channel's scale and leaves the codes alone. Training with live statistics and deployment
with folded ones therefore compute with the same codes, however far the statistics move. A negative factor
makes the weight's scale negative while the codes are chosen, and the folded scale positive again.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from isogrid.formats import Grid
from isogrid.layers.arithmetic import smallest_weight_scale

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

SMALLEST_SCALE = 2.0**-64
"""Folded scales stay above this, far from where float32 loses precision."""

LARGEST_GROWTH = 2.0**64
"""No weight has codes other than 0 at a scale that is larger by this, and products with it stay finite."""


class Folded(NamedTuple):
    """What deployment uses instead of batch norm; float32 [channels].

    Attributes:
        weight_factor: the weight is divided by `weight_scale * weight_factor` to give the codes; negative where batch
            norm's factor is; its magnitude is 1 but where the bias would not fit, or the scale had to be rounded.
        scale: the scale of the folded weight, positive.
        shift: what is added after scaling: the folded bias.
    """

    weight_factor: Tensor
    scale: Tensor
    shift: Tensor


def factor_and_shift(batch_norm: BatchNorm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Batch norm by its running statistics as `factor * y + shift`, float32 [channels]; the bias is before it."""
    assert batch_norm.running_mean is not None and batch_norm.running_var is not None
    deviation = torch.sqrt(batch_norm.running_var.float() + batch_norm.eps)
    gain = torch.ones_like(deviation) if batch_norm.weight is None else batch_norm.weight.detach().float()
    offset = torch.zeros_like(deviation) if batch_norm.bias is None else batch_norm.bias.detach().float()
    factor = gain / deviation
    mean = batch_norm.running_mean.float()
    return factor, offset + ((mean.new_zeros(()) if bias is None else bias.detach().float()) - mean) * factor


def fold(
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    batch_norm: BatchNorm | None,
    scale_grid: Grid | None = None,
) -> Folded:
    """Scales and shift for deployment.

    A channel whose shift is so large against its scale that the int32 bias would overflow gets a larger scale;
    batch norm's dead channels are of this kind, and all their codes become zero. Scales that are stored on a grid of
    their own, such as powers of two, are rounded to it after folding, and the codes are those of the rounded scale.

    Args:
        weight_scale: of the quantiser, positive, float32 [channels] or [1].
        input_scale: float32 [1].
        bias: of the layer, [channels] or None.
        batch_norm: in evaluation, or None.
        scale_grid: how scales are stored; None for float32.

    >>> folded = fold(torch.tensor([0.5, 0.5]), torch.tensor([0.1]), torch.tensor([1.0, 0.0]), None)
    >>> folded.scale, folded.shift
    (tensor([0.5000, 0.5000]), tensor([1., 0.]))
    """
    if batch_norm is None:
        shift = torch.zeros_like(weight_scale) if bias is None else bias.detach().float()
        factor = torch.ones_like(shift)
    else:
        factor, shift = factor_and_shift(batch_norm, bias)
    sign = torch.where(factor < 0, -1.0, 1.0)
    scale = weight_scale.detach() * factor.abs()
    smallest = smallest_weight_scale(shift, input_scale.detach()).clamp(min=SMALLEST_SCALE)
    if scale_grid is None:
        growth = torch.where(scale < smallest, smallest / scale, 1.0).clamp(max=LARGEST_GROWTH)
        return Folded(sign * growth, torch.maximum(scale, smallest), shift)
    stored = scale_grid.nearest(torch.maximum(scale, 2 * smallest))
    return Folded(sign * (stored / scale).clamp(max=LARGEST_GROWTH), stored, shift)
