"""What rules and scheme say about one layer or operation, before anything is placed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What rules and scheme say about one layer or operation; as in `isogrid.Rule`."""

    weight: str
    activation: str | None
    scale: str
    estimator: str
    range: str
    reason: str


NORM_WEIGHT = Choice("int8/channel", None, "frozen", "ste", "absmax", "batch norm alone: a convolution by 1, exact")
"""Batch norm alone multiplies each channel by 1, then by its factor, which is the scale of that 1."""
