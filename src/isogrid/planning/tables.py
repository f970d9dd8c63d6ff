"""Which activations become tables of codes."""

from collections.abc import Collection, Mapping

from isogrid.planning.chains import Chain
from isogrid.planning.graph import Graph

KIND = "activation"


def idle_tables(graph: Graph, chains: Mapping[str, Chain], concats: Collection[str]) -> set[str]:
    """The activations that stand alone: a table would only round what is float before or behind it anyway.

    A table pays where integer arithmetic makes its input and reads its output, at once or by way of other tables.

    Args:
        graph: of the model.
        chains: of the computing calls that are quantised.
        concats: names of the concatenations that may be quantised.
    """
    chain_of = {chain.value_of(call): chain for chain in chains.values() for call in chain.calls}

    def is_made(value: int) -> bool:
        origin, _ = graph.origin(value)
        producer, chain = graph.producer.get(origin), chain_of.get(origin)
        if producer is not None and producer.name in concats:
            return all(is_made(part) for part in producer.inputs)
        return chain is not None and (chain.call.kind != KIND or is_made(chain.call.inputs[0]))

    def is_read(value: int) -> bool:
        for call in graph.readers(value):
            if call.name in concats or (call.name in chains and call.kind == KIND):
                chain = chains.get(call.name)
                if is_read(call.output if chain is None else chain.value_of(call)):
                    return True
            elif call.name in chains:
                return True
        return False

    idle = set()
    for name, chain in chains.items():
        if chain.call.kind == KIND:
            calls = graph.calls_of(name)
            outputs = [chain.value_of(call) for call in calls]
            if not (all(is_made(call.inputs[0]) for call in calls) and any(map(is_read, outputs))):
                idle.add(name)
    return idle
