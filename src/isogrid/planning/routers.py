"""Routers: the small layers that choose experts, which stay float."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from isogrid.planning.graph import Graph

EXPERTS = "experts"
"""What every mixture of experts in transformers calls the module of its experts."""


def routers(model: nn.Module, graph: Graph) -> dict[str, str]:
    """The layers that choose experts, with the reason why they stay float.

    A router is a linear layer beside a module called `experts` that has an output for each of them, or a single output,
    as the gate of an expert that every token sees.
    """
    found = {}
    for name, calls in graph.by_name.items():
        if calls[0].kind != "linear":
            continue
        outputs = calls[0].shape[-1]
        if any(outputs in (1, count) for count in _experts_beside(model, name)):
            found[name] = "a router: a code more or less would send a token to another expert"
    return found


def _experts_beside(model: nn.Module, name: str) -> Iterator[int]:
    """How many experts there are beside a layer, and beside the module that it is the only work of."""
    parent = name
    for _ in range(2):
        inside, parent = parent, parent.rpartition(".")[0]
        siblings: Any = model.get_submodule(parent)
        experts = getattr(siblings, EXPERTS, None)
        if isinstance(experts, nn.Module) and inside.rpartition(".")[2] != EXPERTS:
            yield len(experts) if isinstance(experts, nn.ModuleList) else int(getattr(experts, "num_experts", 0))
        if not parent:
            return
