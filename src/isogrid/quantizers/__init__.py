"""Formats made trainable: ranges choose a scale, estimators pass a gradient, a quantizer holds both."""

from isogrid.quantizers.estimators import LSQ, EfficientQAT, Estimator, Gradients, Identity, Position, StraightThrough
from isogrid.quantizers.functional import Operand, fake_quantize, quantized_operation
from isogrid.quantizers.quantizer import Quantizer, ScaleRule
from isogrid.quantizers.ranges import (
    MSE,
    RMS,
    AbsMax,
    AbsMean,
    HistogramKL,
    MinMax,
    MovingAverage,
    Nudged,
    Percentile,
    Range,
)

__all__ = [
    "LSQ",
    "MSE",
    "RMS",
    "AbsMax",
    "AbsMean",
    "EfficientQAT",
    "Estimator",
    "Gradients",
    "HistogramKL",
    "Identity",
    "MinMax",
    "MovingAverage",
    "Nudged",
    "Operand",
    "Percentile",
    "Position",
    "Quantizer",
    "Range",
    "ScaleRule",
    "StraightThrough",
    "fake_quantize",
    "quantized_operation",
]
