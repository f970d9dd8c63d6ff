"""From a model to a plan and from a plan to a prepared and a converted model."""

from isogrid.planning.adopt import adopt
from isogrid.planning.capture import capture
from isogrid.planning.convert import convert
from isogrid.planning.plan import LayerPlan, OperationPlan, Plan, Site
from isogrid.planning.prepare import prepare
from isogrid.planning.rules import SCHEMES, Rule, Scheme, scheme_from_name

__all__ = [
    "SCHEMES",
    "LayerPlan",
    "OperationPlan",
    "Plan",
    "Rule",
    "Scheme",
    "Site",
    "adopt",
    "capture",
    "convert",
    "prepare",
    "scheme_from_name",
]
