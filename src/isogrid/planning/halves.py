"""Layers that stay float, in float16: what a plan says about them."""

from collections.abc import Mapping

from isogrid.errors import PlanError
from isogrid.planning.plan import LayerPlan, Site
from isogrid.planning.rules import Rule

HALF = "float16"


def half_plans(reasons: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[Site], list[LayerPlan]]:
    """The weights and the layers.

    Args:
        reasons: why each layer is one, by its path.
        shapes: of the weights.

    >>> sites, layers = half_plans({"head": "it is the head"}, {"head": (10, 64)})
    >>> sites[0].format, layers[0].arithmetic
    ('float16', 'half')
    """
    sites, layers = [], []
    for path, reason in reasons.items():
        # float16 has no scale: nothing to learn, and no range to choose.
        sites.append(Site(f"{path}.weight", "weight", HALF, "frozen", "identity", "absmax", shapes[path], reason))
        layers.append(LayerPlan(path, f"{path}.weight", arithmetic="half"))
    return sites, layers


def asks_for_half(rule: Rule | None) -> bool:
    """Whether a rule asks for float16; raises PlanError where it asks for more, which would have no effect."""
    if rule is None or rule.weight != HALF:
        return False
    others = (name for name in ("activation", "scale", "estimator", "range") if getattr(rule, name) is not None)
    if (other := next(others, None)) is not None:
        raise PlanError(f"The rule for {rule.match!r} asks for {HALF}, so {other!r} has no effect. Drop it.")
    return True
