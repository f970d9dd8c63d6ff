"""Batch norms that no layer absorbs: after an addition, before a layer, behind a layer that is used twice."""

from collections.abc import Collection
from dataclasses import replace

from isogrid.planning.chains import find_chains
from isogrid.planning.graph import LAYER_KINDS, Call, Graph


def lone_norms(graph: Graph, names: Collection[str]) -> set[str]:
    """The batch norms that become layers of their own: those with a quantised neighbour, and no float layer before.

    Args:
        graph: of the model.
        names: of the layers and operations that are quantised.
    """
    absorbed = {chain.batch_norm.name for chain in find_chains(graph, names).values() if chain.batch_norm}
    found: set[str] = set()
    for call in graph.calls:
        if call.kind == "batch_norm" and call.name not in absorbed:
            before = _before(graph, call.inputs[0])
            if before is not None and before.kind in LAYER_KINDS and before.name not in names:
                continue
            quantised = before is not None and (before.name in names or before.name in found)
            if quantised or any(reader.name in names for reader in _readers(graph, call.output)):
                found.add(call.name)
    return found


def as_convolutions(graph: Graph, norms: Collection[str]) -> Graph:
    """The graph in which these batch norms are what they compute: convolutions of each channel by one number."""
    calls = (replace(call, kind="convolution") if call.name in norms else call for call in graph.calls)
    return replace(graph, calls=tuple(calls))


def _before(graph: Graph, value: int) -> Call | None:
    call = graph.producer.get(graph.origin(value)[0])
    return _before(graph, call.inputs[0]) if call is not None and call.kind == "clamp" else call


def _readers(graph: Graph, value: int) -> list[Call]:
    found = []
    for call in graph.readers(value):
        found += _readers(graph, call.output) if call.kind == "clamp" else [call]
    return found
