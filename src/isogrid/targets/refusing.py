"""Layers that a runtime with a graph of its own for each architecture cannot run."""

from isogrid.errors import TargetError
from isogrid.layers.hadamard import HadamardLinear
from isogrid.planning.graph import Call


def refuse_hadamard(call: Call, runtime: str) -> None:
    """Raise TargetError for a layer that turns its input while it runs.

    >>> refuse_hadamard(Call("fc", "linear", "Linear", "fc", (0,), (1,)), "llama.cpp")
    """
    if call.type == HadamardLinear.__name__:
        raise TargetError(
            f"{call.name!r} turns its input by a Hadamard matrix while it runs, and {runtime} has no such step in its "
            "graph of the model. Rotate without online=; rotations inside the weights are kept."
        )
