"""Streaming statistics of activations, for ranges that hold for a whole tensor."""

from collections.abc import Callable, Iterable
from math import log2
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isogrid.errors import FormatError, NonFiniteError, NotCalibratedError, PlanError
from isogrid.formats import Affine, Format
from isogrid.quantizers.fitting import PIECE
from isogrid.quantizers.ranges import MovingAverage, Range

SMALLEST_EXPONENT = -100
"""The histogram reaches at least 2**-100: there its arithmetic is still exact in float32."""


class Observer(nn.Module):
    """Extremes, their moving average, and a histogram of every tensor it is shown.

    The histogram covers `-2**exponent .. 2**exponent` with bins of equal width. When a value lies beyond, the reach
    doubles until it holds the value, and neighbouring bins become one. Bin edges being dyadic, and counts
    integers, the outcome is exact: the same bits in whatever order and batches the data comes, on any
    device. Exact zeros (after a ReLU, in padding) are counted apart.

    Args:
        bins: of the histogram, a power of two; 0 for ranges that need none.
        momentum: of the moving average, see MovingAverage.

    Attributes:
        lowest, highest: float32 [1]; infinity and minus infinity before the first batch.
        mean_lowest, mean_highest: float32 [1], the batches' extremes averaged.
        batches: int64 [2], how many were seen: by each rank up to the last synchronize, by this one since.
        exponent: int32 [1].
        counts: int64 [2, bins + 1], values in each bin, zeros last: those of all ranks up to the last synchronize,
            those of this one since.

    All of it is in the state dict. Moving the module to another float dtype leaves the statistics as they are.

    >>> from isogrid.formats import named_format
    >>> from isogrid.quantizers.ranges import MinMax
    >>> observer = Observer()
    >>> observer.observe(torch.tensor([0.0, 1.0]))
    >>> observer.observe(torch.tensor([[2.0], [2.55]]))
    >>> observer.affine(named_format("uint8/tensor"), MinMax())
    Affine(scale=tensor([0.0100]), zero_point=tensor([0.]), offset=None)
    """

    lowest: Tensor
    highest: Tensor
    mean_lowest: Tensor
    mean_highest: Tensor
    batches: Tensor
    exponent: Tensor
    counts: Tensor

    def __init__(self, bins: int = 4096, momentum: float = MovingAverage.momentum):
        super().__init__()
        if bins and (bins < 2 or not log2(bins).is_integer()):
            raise PlanError(f"An observer's histogram has a power of two of bins, not {bins}.")
        self.bins, self.momentum = bins, momentum
        self.register_buffer("lowest", torch.empty(1))
        self.register_buffer("highest", torch.empty(1))
        self.register_buffer("mean_lowest", torch.empty(1))
        self.register_buffer("mean_highest", torch.empty(1))
        self.register_buffer("batches", torch.empty(2, dtype=torch.int64))
        self.register_buffer("exponent", torch.empty(1, dtype=torch.int32))
        self.register_buffer("counts", torch.empty(2, bins + 1, dtype=torch.int64))
        self.reset()

    @classmethod
    def for_range(cls, range: Range) -> "Observer":
        """An observer that keeps what a range needs and no more."""
        momentum = range.momentum if isinstance(range, MovingAverage) else MovingAverage.momentum
        return cls(bins=4096 if range.needs_histogram else 0, momentum=momentum)

    def reset(self) -> None:
        """Forget everything."""
        self.lowest.fill_(torch.inf)
        self.highest.fill_(-torch.inf)
        for buffer in (self.mean_lowest, self.mean_highest, self.batches, self.counts):
            buffer.zero_()
        self.exponent.fill_(SMALLEST_EXPONENT)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take in one tensor.

        Without a histogram (`bins=0`) this is a handful of tensor operations that torch.compile takes whole.
        A tensor without elements has no statistics and changes nothing: an expert that got no token is no error.

        Args:
            x: [...], of any dtype; read in float32.

        Raises:
            NonFiniteError: x holds NaN or infinity; the statistics stay as they were. Inside torch.compile, where
                nothing can be raised, they become non-finite instead, and `affine` raises.
        """
        if x.numel() == 0:
            return
        extremes = torch.stack(torch.aminmax(x.detach())).to(torch.float32)
        if not torch.compiler.is_compiling() and not extremes.isfinite().all():
            unfit = int((~x.to(torch.float32).isfinite()).sum())
            raise NonFiniteError(f"NaN or infinity where a range is observed: {unfit} of {x.numel()} values are.")
        lowest, highest = extremes[:1], extremes[1:]
        self.batches[1:] += 1
        rate = (1.0 / self.batches.sum()).clamp(min=1.0 - self.momentum)
        self.mean_lowest += (lowest - self.mean_lowest) * rate
        self.mean_highest += (highest - self.mean_highest) * rate
        self.lowest.copy_(torch.minimum(self.lowest, lowest))
        self.highest.copy_(torch.maximum(self.highest, highest))
        if self.bins:
            largest = extremes.abs().amax()[None]
            self.widen(torch.where(largest == 0, SMALLEST_EXPONENT, torch.frexp(largest).exponent))
            self.counts[1] += self._histogram(x.detach())

    @torch.no_grad()
    def affine(self, fmt: Format, range: Range) -> Affine:
        """The parameters that a range chooses from what was seen.

        Args:
            fmt: of tensor granularity.
            range: reads extremes exactly, and everything else from the bins' centres.

        Returns:
            float32 parameters of shape [1], before storage.

        Raises:
            NotCalibratedError: nothing was seen, or no histogram was kept.
            NonFiniteError: NaN or infinity was seen inside torch.compile.
            FormatError: one scale cannot serve this granularity.
        """
        if fmt.scale_shape((4, 2)) != (1, 1):
            raise FormatError(
                f"What an observer saw gives one scale a tensor; {fmt} needs more. Use tensor granularity."
            )
        if not torch.compiler.is_compiling():
            self._check(range)
        if isinstance(range, MovingAverage):
            return range.fit(torch.stack((self.mean_lowest, self.mean_highest), 1), fmt)
        if not range.needs_histogram:
            return range.fit(torch.stack((self.lowest, self.highest), 1), fmt)
        values, counts = self.histogram()
        return range.fit(values, fmt, counts)

    def histogram(self) -> tuple[Tensor, Tensor]:
        """What was seen, as values and how often each occurred.

        Returns:
            values: float32 [1, n], ascending: centres of the occupied bins, zero, and the extremes.
            counts: float64 [1, n]; 0 for the extremes, which are counted in their bins.
        """
        counts = self.counts.sum(0)
        half, width = self.bins // 2, _power_of_two(self.exponent - int(log2(self.bins)) + 1)
        index = torch.arange(self.bins, device=counts.device)
        centres = ((index - half) + 0.5) * width
        zero = counts.new_zeros(1)
        values = torch.cat((self.lowest, centres[:half], zero, centres[half:], self.highest))
        values = values.clamp(self.lowest, self.highest)
        counts = torch.cat((zero, counts[:half], counts[-1:], counts[half:-1], zero))
        seen = counts > 0
        seen[0] = seen[-1] = True
        return values[seen][None], counts[seen].to(torch.float64)[None]

    def synchronize(self, group: Any = None) -> None:
        """Let all ranks have seen what each of them saw; see `synchronize`."""
        synchronize([self], group)

    def _check(self, range: Range) -> None:
        if not int(self.batches.sum()):
            raise NotCalibratedError("No data was seen, so there is no range. Run isogrid.calibrate(model, batches).")
        if not torch.cat((self.lowest, self.highest)).isfinite().all():
            raise NonFiniteError("NaN or infinity was seen where a range is observed. Find where it comes from.")
        if isinstance(range, MovingAverage) and range.momentum != self.momentum:
            raise PlanError(f"The observer averaged with momentum {self.momentum}, not with that of {range}.")
        if range.needs_histogram and not self.bins:
            raise NotCalibratedError(f"{range} needs a histogram. Make its observer with Observer.for_range(range).")

    def _histogram(self, x: Tensor) -> Tensor:
        """Counts int64 [bins + 1] of values within reach, zeros last."""
        # A power of two times a float32 is exact, or so small that it becomes 0 either way: no value lands in a
        # neighbour's bin. Conversion to integers cuts towards zero, so negative values count down from half - 1.
        per_unit = _power_of_two(int(log2(self.bins)) - 1 - self.exponent)
        half = self.bins // 2
        counts = torch.zeros_like(self.counts[0])
        for values in torch.split(x.reshape(-1), PIECE.get(x.device.type, PIECE["cuda"])):
            values = values.to(torch.float32)
            index = (values * per_unit).to(torch.int32).add_(half).sub_((values < 0).to(torch.int32))
            counts += torch.bincount(index, minlength=self.bins + 1)
            zeros = values.numel() - torch.count_nonzero(values)
            counts[half] -= zeros
            counts[-1] += zeros
        return counts

    def widen(self, exponent: Tensor) -> None:
        """Double the histogram's reach until it is at least 2**exponent (int32 [1]), neighbouring bins becoming one."""
        doublings = (exponent - self.exponent).clamp(min=0)
        self.exponent += doublings
        half = self.bins // 2
        index = torch.arange(self.bins, device=self.counts.device) - half
        merged = (index >> doublings.clamp(max=62)) + half
        bins = torch.zeros_like(self.counts[:, :-1]).index_add_(1, merged, self.counts[:, :-1])
        self.counts[:, :-1] = bins

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Observer":
        """Follow the module to another device, but keep float32 where the model is cast to half precision."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        return self


@torch.no_grad()
def synchronize(observers: Iterable[Observer], group: Any = None) -> None:
    """Let every rank have seen what all ranks saw, with three collectives for any number of observers.

    Extremes become the least and the greatest of all. Histograms add up exactly, each rank contributing what it
    saw since the last time. Moving averages become their mean over ranks, weighted by the batches since the last time;
    one batch of every rank counts as one, so that momentum means the same for any number of ranks.
    Without an initialised process group nothing happens. All ranks must call it with the same observers.

    Args:
        observers: any number, on any device.
        group: of processes; None means all.
    """
    observers = list(observers)
    if not observers or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    device = observers[0].lowest.device

    def agree(rows: list[Tensor], operation: dist.ReduceOp.RedOpType) -> list[Tensor]:
        packed = torch.cat([row.to(device) for row in rows])
        dist.all_reduce(packed, operation, group)
        return list(torch.split(packed, [len(row) for row in rows]))

    own = [torch.cat((o.lowest, -o.highest, -o.exponent, -o.batches[1:])) for o in observers]
    extremes = agree(own, dist.ReduceOp.MIN)
    one = torch.ones(1, device=device)
    own = [
        torch.cat((o.mean_lowest, o.mean_highest, one.to(o.lowest.device))).double() * o.batches[1] for o in observers
    ]
    means = agree(own, dist.ReduceOp.SUM)
    for observer, (lowest, highest, exponent, fresh), (mean_lowest, mean_highest, weight) in zip(
        observers, extremes, means, strict=True
    ):
        observer.lowest.copy_(lowest)
        observer.highest.copy_(-highest)
        observer.widen((-exponent).to(observer.exponent))
        if weight > 0:
            observer.mean_lowest.copy_(mean_lowest / weight)
            observer.mean_highest.copy_(mean_highest / weight)
        observer.batches[0] -= fresh.long()
        observer.batches[1] = 0
    counts = agree([o.counts[1] for o in observers], dist.ReduceOp.SUM)
    for observer, fresh in zip(observers, counts, strict=True):
        observer.counts[0] += fresh.to(observer.counts.device)
        observer.counts[1] = 0


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent for int32 exponents of normal numbers, exact on every device, float32."""
    return ((exponent + 127) << 23).view(torch.float32)
