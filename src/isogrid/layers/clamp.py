"""Activations that only limit values: ReLU, ReLU6, Hardtanh, clamp. In codes they are a lowest and a highest code."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Clamp:
    """`min(max(x, low), high)`; None is no bound.

    >>> Clamp(0.0, 6.0)(torch.tensor([-1.0, 3.0, 9.0]))
    tensor([0., 3., 6.])
    """

    low: float | None = None
    high: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Clamped values; the gradient is zero at and beyond a bound."""
        return F.hardtanh(x, *self.bounds)

    @property
    def bounds(self) -> tuple[float, float]:
        """Both bounds, infinite where there is none."""
        return -inf if self.low is None else self.low, inf if self.high is None else self.high

    def limits(self, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
        """The codes of the bounds on a grid, float32: limiting codes by them is what clamping values does.

        Rounding is monotone, so that the code of a clamped value is the clamped code of the value.

        >>> Clamp(0.0, 6.0).limits(torch.tensor([0.05]), torch.tensor([10.0]), 0, 255)
        (tensor([10.]), tensor([130.]))
        """
        return tuple(  # type: ignore[return-value]
            torch.full_like(zero_point, limit)
            if bound is None
            else (torch.round(torch.full_like(scale, bound) / scale) + zero_point).clamp(lowest, highest)
            for bound, limit in ((self.low, lowest), (self.high, highest))
        )

    def __str__(self) -> str:
        known = {RELU: "relu", Clamp(0.0, 6.0): "relu6"}
        return known.get(self, f"clamp({self.low}, {self.high})")


RELU = Clamp(low=0.0)

CLAMPS: dict[Callable[..., Any], str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    **dict.fromkeys((F.relu6,), "relu6"),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), "hardtanh"),
    **dict.fromkeys((torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_), "clamp"),
    **dict.fromkeys((torch.clip, torch.clip_, Tensor.clip, Tensor.clip_), "clamp"),
    **dict.fromkeys((torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_), "clamp_min"),
    **dict.fromkeys((torch.clamp_max, torch.clamp_max_, Tensor.clamp_max, Tensor.clamp_max_), "clamp_max"),
}
"""The torch functions that clamp, by the names of their sites."""

CLAMPS_IN_PLACE = frozenset(
    {F.relu_, torch.relu_, Tensor.relu_, F.hardtanh_, torch.clamp_, Tensor.clamp_, torch.clip_, Tensor.clip_}
    | {torch.clamp_min_, Tensor.clamp_min_, torch.clamp_max_, Tensor.clamp_max_}
)
"""Those that write to their argument."""

_BOUNDS = {
    "relu": (("", 0.0), ("", None)),
    "relu6": (("", 0.0), ("", 6.0)),
    "hardtanh": (("min_val", -1.0), ("max_val", 1.0)),
    "clamp": (("min", None), ("max", None)),
    "clamp_min": (("min", None), ("", None)),
    "clamp_max": (("", None), ("max", None)),
}
"""For each name: the arguments that are the low and the high bound, and what they are if they are not given."""


def clamp_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Clamp | None:
    """The clamp that a call of a function in `CLAMPS` is; None where its bounds are tensors.

    Args:
        name: of the function's sites.
        args, kwargs: of the call, the tensor in front.

    >>> clamp_of("hardtanh", (torch.zeros(1),), {"max_val": 4})
    Clamp(low=-1.0, high=4.0)
    """
    given = list(args[1:]) if name not in ("relu", "relu6") else []
    found: list[float | None] = []
    for argument, default in _BOUNDS[name]:
        value: Any = default
        if argument:
            value = kwargs[argument] if argument in kwargs else given.pop(0) if given else default
        if isinstance(value, Tensor):
            return None
        found.append(None if value is None or abs(value) == inf else float(value))
    return Clamp(*found)
