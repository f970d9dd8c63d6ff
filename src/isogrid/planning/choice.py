"""What rules and scheme say about one layer or operation, before anything is placed."""

from dataclasses import dataclass
from typing import Any

from isogrid.errors import FormatError
from isogrid.formats import named_format
from isogrid.planning.mixtures import Assigned
from isogrid.planning.rules import Rule, Scheme
from isogrid.quantizers.estimators import estimator_from_name


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


def choose(name: str, rule: Rule | None, scheme: Scheme, assigned: Assigned, strict: bool) -> Choice:
    """What becomes of a layer or operation.

    Args:
        name: its own.
        rule: the first that matches it, if any; what it leaves open the scheme decides.
        scheme: of the plan.
        assigned: what the scheme stores this layer's weight in.
        strict: no format may stand in for another.

    Raises:
        FormatError: one would have to.
    """
    asked = None if rule is None else rule.weight
    if asked is None and strict and assigned.instead_of:
        raise FormatError(
            f"{name!r}, strictly planned: {assigned.reason}. Plan without strict=True to have it so, or write a "
            "rule that names a format which fits, or keeps the layer in float."
        )
    weight, why = (assigned.weight, assigned.reason) if asked is None else (asked, "")
    who = f"scheme {scheme.name}" if rule is None else f"rule {rule.match!r}"

    def said(what: str) -> Any:
        """By the rule, else by the scheme, which says how its own formats are trained and nothing about a rule's."""
        by_rule = None if rule is None else getattr(rule, what)
        return by_rule or (None if asked is not None else getattr(scheme, what))

    estimator = said("estimator")
    learns = estimator is None or "scale" in estimator_from_name(estimator).learns
    scale = said("scale") or ("learned" if learns and named_format(weight).scale is not None else "frozen")
    return Choice(
        weight=weight,
        activation=(rule and rule.activation) or scheme.activation,
        scale=scale,
        estimator=estimator or ("lsq" if scale == "learned" else "ste"),
        range=said("range") or "mse",
        reason=f"{who}: {why}" if why else who,
    )
