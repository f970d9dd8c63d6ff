"""Neighbours: which values integer arithmetic makes, and which it reads."""

from collections.abc import Collection, Iterable, Mapping

from isogrid.planning.chains import Chain, find_chains
from isogrid.planning.graph import JOINING_KINDS, Graph


class Neighbours:
    """What comes before and behind the values of a graph.

    Attributes:
        graph: of the model.
        chains: of the computing calls that are quantised, by name.
        joins: names of the concatenations and choices that are quantised.
        float_endings: kinds of calls that leave their output in float where no integer arithmetic reads it.
        floats: values that their layers leave float, for whatever reads them.
    """

    def __init__(
        self,
        graph: Graph,
        chains: Mapping[str, Chain],
        joins: Collection[str],
        float_endings: Collection[str],
        floats: Iterable[int] = (),
    ):
        self.graph, self.chains, self.joins = graph, chains, frozenset(joins)
        self.float_endings, self.floats = frozenset(float_endings), frozenset(floats)
        self._chain_of_value = {chain.value_of(call): chain for chain in chains.values() for call in chain.calls}

    def with_floats(self, floats: Iterable[int]) -> "Neighbours":
        """The same with values that their layers leave float."""
        return Neighbours(self.graph, self.chains, self.joins, self.float_endings, floats)

    def is_produced(self, value: int) -> bool:
        """Whether a value leaves its producer quantised: all products of a name do if integer arithmetic reads one."""
        producer = self.graph.producer.get(value)
        if producer is not None and producer.name in self.joins:
            return True
        chain = None if value in self.floats else self._chain_of_value.get(value)
        return chain is not None and (chain.call.kind not in self.float_endings or self._is_any_read(chain))

    def is_read(self, value: int) -> bool:
        """Whether integer arithmetic reads a value."""
        return any(
            call.name in self.chains or (call.name in self.joins and self.is_read(call.output))
            for call in self.graph.readers(value)
        )

    def is_idle(self, name: str) -> bool:
        """Whether all that quantising a call would do is round what is float before or behind it in any case.

        So it is with a sum of which no operand is quantised, with a product of which one is computed in float, with a
        function or mean of a value that is, and with these and concatenations if no integer arithmetic reads what comes
        out. Means and products are often a norm spelt out: eight bits of a variance would make one of a few bits.
        """
        calls = self.graph.calls_of(name)
        if name in self.joins:
            # Between floats alone, a choice leaves the rounding of one value to whoever reads it.
            joined = [self.graph.origin(value)[0] for call in calls for value in call.inputs]
            is_fed = calls[0].kind == "concat" or any(self.is_produced(value) for value in joined)
            return not (is_fed and any(self.is_read(call.output) for call in calls))
        kind = "mean" if calls[0].type == "mean" else calls[0].kind
        if kind not in ("add", "multiply", "activation", "mean"):
            return False
        origins = [self.graph.origin(value)[0] for call in calls for value in call.inputs]
        fed = [self.is_produced(value) for value in origins]
        if kind == "multiply":
            # A parameter has a grid as good as any, and so has what comes from positions.
            computed = [is_fed for is_fed, value in zip(fed, origins, strict=True) if self._is_computed(value)]
            is_fed = any(fed) and all(computed)
        else:
            is_fed = any(fed) if kind == "add" else all(fed)
        return not (is_fed and self._is_any_read(self.chains[name]))

    def _is_computed(self, value: int) -> bool:
        is_made = value in self.graph.producer or value in self.graph.model_inputs
        return is_made and value in self.graph.from_data

    def _is_any_read(self, chain: Chain) -> bool:
        return any(self.is_read(chain.value_of(call)) for call in chain.calls)


def neighbours_at_work(graph: Graph, names: Iterable[str], float_endings: Collection[str]) -> Neighbours:
    """The neighbours of the calls of these names, without those that are idle, and then without those idle by that."""
    working = list(names)
    while True:
        joins = [name for name in working if graph.calls_of(name)[0].kind in JOINING_KINDS]
        neighbours = Neighbours(graph, find_chains(graph, working), joins, float_endings)
        idle = {name for name in (*neighbours.chains, *joins) if neighbours.is_idle(name)}
        if not idle:
            return neighbours
        working = [name for name in working if name not in idle]
