"""Functions of float values that a runtime computes by a rule of its own: operations of a plan without any grid."""

from collections.abc import Iterable

from isogrid.layers.kernels import KERNELS
from isogrid.planning.graph import Call
from isogrid.planning.plan import OperationPlan

KIND = "function"


def is_runtime_function(call: Call, kernels: str) -> bool:
    """Whether a call is a function that the runtime with these kernels has in a form of its own.

    >>> is_runtime_function(Call("act.gelu", "activation", "gelu", "act", (0,), (1,)), "ggml")
    True
    """
    return call.kind == "activation" and call.type in KERNELS[kernels].functions


def function_plans(calls: Iterable[Call]) -> list[OperationPlan]:
    """What becomes of such calls."""
    return [OperationPlan(call.scope, call.name.rpartition(".")[2], KIND, (None,), None) for call in calls]
