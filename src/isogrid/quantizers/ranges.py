"""Ranges: how a scale is chosen from data.

A range is a frozen dataclass with one method, `fit`. A new one is one class here and its line in `RANGES`.
"""

import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import ClassVar

import torch
from torch import Tensor

from isogrid.errors import FormatError, NotCalibratedError, PlanError
from isogrid.formats import Affine, Format, NativeGrid
from isogrid.formats.format import extremes_affine
from isogrid.quantizers.entropy import least_divergence_affine
from isogrid.quantizers.fitting import (
    bound,
    check_finite,
    combine,
    ends_affine,
    magnitudes,
    mean,
    quantile,
    root_mean_square,
    usable,
)
from isogrid.quantizers.gaussian import gaussian_multiple
from isogrid.quantizers.least_error import least_error_affine
from isogrid.quantizers.nudged import nudged_affine


@dataclass(frozen=True)
class Range:
    """How a scale, and the zero point or offset where a format has one, is chosen from data.

    Class attributes:
        needs_histogram: whether more of the data counts than its extremes.
        refines: whether scales on a shared scale are searched for again, together; see `isogrid.quantizers.nested`.
    """

    needs_histogram: ClassVar[bool] = True
    refines: ClassVar[bool] = False

    def fit(self, rows: Tensor, fmt: Format, weights: Tensor | None = None) -> Affine:
        """The parameters of each row.

        Args:
            rows: float tensor [blocks, values]; computed in float32 whatever its dtype.
            fmt: what the parameters are for. The range of a zero point always contains 0.
            weights: float [blocks, values], how often each value occurs; None counts each once. With weights the
                rows are histograms: their values ascend.

        Returns:
            float32 parameters of shape [blocks], before the rounding of their storage; all None for a format
            without a scale. Scales are positive and finite: a row of zeros gets scale 1, which is as
            good as any (grids without a zero and scales on a shared scale: see `fitting.usable`).

        Raises:
            NonFiniteError: a value is NaN or infinite. AbsMax, MinMax, AbsMean, MeanMagnitude and RMS, which may run
                in every training step, do not look, and let NaN through to the scale instead.
            NotCalibratedError: there are no values.
            FormatError: the grid cannot be used with this range, or is a codebook of vectors and weights are given.
        """
        if fmt.scale is None:
            return Affine(None)
        if weights is not None and fmt.grid.dimension > 1:
            raise FormatError(
                f"{fmt} quantises neighbours together, which a histogram does not know. Use another grid."
            )
        if rows.shape[1] == 0:
            raise NotCalibratedError("There are no values to choose a range from: the tensor is empty.")
        if rows.shape[0] == 0:
            return extremes_affine(rows.to(torch.float32), fmt)
        return usable(self.choose(rows.to(torch.float32), fmt, weights), fmt)

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        """`fit` for float32 rows, before scales are made positive; subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to choose a scale.")


@dataclass(frozen=True)
class MinMax(Range):
    """From the smallest to the largest value; for a symmetric format, from minus to plus the largest magnitude.

    Nothing is clipped. This is what `Format.quantize` does without a scale.

    >>> from isogrid.formats import named_format
    >>> MinMax().fit(torch.tensor([[0.0, 1.0, 2.55], [-2.55, 0.0, 0.0]]), named_format("uint8/tensor"))
    Affine(scale=tensor([0.0100, 0.0100]), zero_point=tensor([  0., 255.]), offset=None)
    """

    needs_histogram: ClassVar[bool] = False

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        return extremes_affine(rows, fmt)


@dataclass(frozen=True)
class AbsMax(Range):
    """From minus to plus the largest magnitude, also where a zero point or offset could follow the data.

    For symmetric formats the same as MinMax.

    >>> from isogrid.formats import named_format
    >>> AbsMax().fit(torch.tensor([[0.5, -3.5]]), named_format("int4/tensor")).scale
    tensor([0.5000])
    """

    needs_histogram: ClassVar[bool] = False

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        if fmt.is_symmetric:
            return extremes_affine(rows, fmt)
        largest = rows.abs().amax(1)
        return ends_affine(-largest, largest, fmt)


@dataclass(frozen=True)
class MovingAverage(Range):
    """The extremes of each batch, averaged over batches; on one tensor the same as MinMax.

    The plain mean of the first `1 / (1 - momentum)` batches, an exponential average from there on, so that the first
    batch does not stand for all (Jacob et al., arXiv 1712.05877, average exponentially throughout).

    Args:
        momentum: share of the old average that each new batch leaves.
    """

    needs_histogram: ClassVar[bool] = False
    momentum: float = 0.99

    def __post_init__(self) -> None:
        _require(0.0 <= self.momentum < 1.0, self, "momentum", "at least 0 and below 1")

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        return extremes_affine(rows, fmt)


@dataclass(frozen=True)
class Nudged(MovingAverage):
    """What TensorFlow's model optimization toolkit does: averaged extremes, the zero point nudged to a whole code.

    See `isogrid.quantizers.nudged`. With a format that rounds `half_up` these are the codes of
    `tf.quantization.fake_quant_with_min_max_vars`.

    Args:
        momentum: share of the old average that each new batch leaves; tfmot's decay.

    >>> from isogrid.formats import named_format
    >>> Nudged().fit(torch.tensor([[-1.0, 0.5, 1.55]]), named_format("uint8/tensor:half_up"))
    Affine(scale=tensor([0.0100]), zero_point=tensor([100.]), offset=None)
    """

    momentum: float = 0.999

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        return nudged_affine(rows.amin(1), rows.amax(1), fmt)


@dataclass(frozen=True)
class Percentile(Range):
    """Clips the outermost values; a symmetric format by magnitude, others half of the rest at each end.

    Args:
        percent: how many of 100 values lie inside. Between two values it interpolates, as torch.quantile does.

    >>> from isogrid.formats import named_format
    >>> Percentile(90.0).fit(torch.arange(11.0)[None], named_format("int4/tensor")).scale * 7
    tensor([9.])
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        _require(0.0 < self.percent <= 100.0, self, "percent", "above 0 and at most 100")

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        check_finite(rows)
        inside = self.percent / 100
        if fmt.is_symmetric:
            highest = quantile(magnitudes(rows, fmt.grid), inside, weights)
            lowest = -highest
        else:
            lowest = quantile(rows, (1 - inside) / 2, weights)
            highest = quantile(rows, (1 + inside) / 2, weights)
        clipped = extremes_affine(torch.stack((lowest, highest), 1), fmt)
        # Where so many values are equal that nothing else lies inside, clipping the rest would leave no range.
        assert clipped.scale is not None
        empty = clipped.scale == 0
        return combine(lambda whole, part: torch.where(empty, whole, part), extremes_affine(rows, fmt), clipped)


@dataclass(frozen=True)
class HistogramKL(Range):
    """Clips where the distribution of the codes diverges least from that of the values.

    Entropy calibration as TensorRT and MXNet do it (Migacz, "8-bit inference with TensorRT", GTC 2017), for any
    scalar grid. Meant for activations: a row is searched at a time.

    Args:
        bins: of the histogram of magnitudes.
    """

    bins: int = 2048

    def __post_init__(self) -> None:
        _require(self.bins >= 2, self, "bins", "at least 2")

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        check_finite(rows)
        if fmt.grid.dimension > 1 or isinstance(fmt.grid, NativeGrid):
            raise FormatError(f"HistogramKL compares histograms of codes, which {fmt} does not have. Use MSE.")
        return least_divergence_affine(rows.detach(), fmt, weights, self.bins)


@dataclass(frozen=True)
class AbsMean(Range):
    """The mean magnitude, for binary and ternary grids (BitNet, arXiv 2310.11453 and 2402.17764).

    >>> from isogrid.formats import named_format
    >>> AbsMean().fit(torch.tensor([[0.5, -1.0, 3.0]]), named_format("bitnet")).scale
    tensor([1.5000])
    """

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        if fmt.grid.bits > 2 or len(fmt.grid.values()) > 3:
            raise FormatError(
                f"AbsMean is for grids of two or three values; it would clip {fmt} at the mean. Use MSE or RMS."
            )
        return _with_scale(mean(rows.abs(), weights) / bound(fmt.grid), rows, fmt)


@dataclass(frozen=True)
class MeanMagnitude(Range):
    """`2 mean|v| / sqrt(Q_p)`, where LSQ starts (Esser et al., arXiv 1902.08153); Q_p is the grid's highest value.

    Made for 2 to 4 bits and a scale that is learned. At 8 bits it clips a Gaussian so hard that 13 dB are lost to MSE.

    >>> from isogrid.formats import named_format
    >>> MeanMagnitude().fit(torch.tensor([[1.0, -3.0]]), named_format("uint4/tensor:symmetric")).scale
    tensor([1.0328])
    """

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        return _with_scale(2.0 * mean(rows.abs(), weights) / bound(fmt.grid) ** 0.5, rows, fmt)


@dataclass(frozen=True)
class RMS(Range):
    """A multiple of the root mean square, around the mean where a zero point or offset can follow it.

    Args:
        multiple: how many root mean squares the range reaches to each side. None means the multiple with the least
            squared error on Gaussian data for the format at hand, which for mid-rise, ternary and FP4 grids are the
            constants of QuEST (arXiv 2502.05003). Data that is not bell-shaped, a ReLU's output, wants MSE instead.

    >>> from isogrid.formats import named_format
    >>> RMS().fit(torch.tensor([[1.0, -1.0]]), named_format("ternary/tensor")).scale
    tensor([1.22...])
    """

    multiple: float | None = None

    def __post_init__(self) -> None:
        _require(self.multiple is None or self.multiple > 0.0, self, "multiple", "positive")

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        multiple = gaussian_multiple(fmt) if self.multiple is None else self.multiple
        if fmt.is_symmetric:
            return Affine(root_mean_square(rows, weights) * multiple / bound(fmt.grid))
        centre = mean(rows, weights)
        reach = root_mean_square(rows - centre[:, None], weights) * multiple
        lowest, highest = rows.amin(1), rows.amax(1)
        return ends_affine(torch.maximum(centre - reach, lowest), torch.minimum(centre + reach, highest), fmt)


@dataclass(frozen=True)
class MSE(Range):
    """The parameters with the least squared error, found by search; the default for scales that stay fixed.

    Errors are measured through the format's own arithmetic, with the rounding that storage does to each scale
    (scales on a shared scale count as float32; quantizers refine them together). On Gaussian data the published rules
    lose 1 to 13 dB to it.

    >>> from isogrid.formats import named_format
    >>> gaussian = torch.randn(1, 10000, generator=torch.Generator().manual_seed(0))
    >>> two_bits = named_format("int2/tensor")
    >>> MSE().fit(gaussian, two_bits).scale, MinMax().fit(gaussian, two_bits).scale
    (tensor([1.05...]), tensor([4.34...]))
    """

    refines: ClassVar[bool] = True

    def choose(self, rows: Tensor, fmt: Format, weights: Tensor | None) -> Affine:
        check_finite(rows)
        return least_error_affine(rows.detach(), fmt, weights)


RANGES: dict[str, type[Range]] = {
    "absmax": AbsMax,
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "nudged": Nudged,
    "percentile": Percentile,
    "histogram_kl": HistogramKL,
    "absmean": AbsMean,
    "mean_magnitude": MeanMagnitude,
    "rms": RMS,
    "mse": MSE,
}


def range_from_name(name: str) -> Range:
    """The range that a rule or recipe names, its parameter in parentheses where it is not the default.

    Raises:
        PlanError: the name is unknown, or the parameter is none that this range takes.

    >>> range_from_name("percentile(99.9)")
    Percentile(percent=99.9)
    >>> range_from_name("mse")
    MSE()
    >>> range_from_name("percentil")
    Traceback (most recent call last):
    isogrid.errors.PlanError: Unknown range 'percentil'. Did you mean 'percentile'? Known: absmax, minmax, ...
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", name)
    kind = RANGES.get(match[1]) if match else None
    if match is None or kind is None:
        near = get_close_matches(name.partition("(")[0].strip(), RANGES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"Unknown range {name!r}.{hint} Known: {', '.join(RANGES)}.")
    text = (match[2] or "").strip()
    if not text:
        return kind()
    parameters = fields(kind)
    if not parameters:
        raise PlanError(f"The range {match[1]!r} takes no parameter, but {name!r} gives it one. Write {match[1]!r}.")
    number = int if isinstance(parameters[0].default, int) else float
    try:
        return kind(**{parameters[0].name: number(text)})
    except ValueError:
        raise PlanError(f"{text!r} in {name!r} is no {'whole ' * (number is int)}number.") from None


def range_name(range: Range) -> str:
    """The name that `range_from_name` reads back to an equal range.

    >>> range_name(Percentile(99.9)), range_name(Percentile()), range_name(MSE())
    ('percentile(99.9)', 'percentile', 'mse')
    """
    for name, kind in RANGES.items():
        if type(range) is kind:
            values = [(getattr(range, field.name), field.default) for field in fields(range)]
            return "".join([name, *(f"({value!r})" for value, default in values if value != default)])
    raise PlanError(f"{range} is not registered in isogrid.quantizers.ranges.RANGES, so it has no name.")


def _with_scale(scale: Tensor, rows: Tensor, fmt: Format) -> Affine:
    """A given scale [blocks], with min-max's zero point, or the offset that centres the grid on the extremes."""
    affine = usable(Affine(scale), fmt)
    if fmt.zero_point is not None:
        return affine._replace(zero_point=extremes_affine(rows, fmt).zero_point)
    if fmt.offset is None or affine.scale is None:
        return affine
    offset = (rows.amin(1) + rows.amax(1)) / 2 - affine.scale * (fmt.grid.lowest + fmt.grid.highest) / 2
    return affine._replace(offset=offset.clamp(max=0.0) if fmt.offset.grid.highest <= 0 else offset)


def _require(holds: bool, range: Range, parameter: str, what: str) -> None:
    if not holds:
        raise PlanError(f"{parameter} of {type(range).__name__} must be {what}, not {getattr(range, parameter)!r}.")
