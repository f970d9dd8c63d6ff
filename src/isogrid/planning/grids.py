"""Grids: which values of a graph lie on which grid, and which site owns it."""

from dataclasses import dataclass, field
from functools import cached_property

from isogrid.planning.chains import Chain
from isogrid.planning.graph import Call
from isogrid.planning.neighbours import Neighbours
from isogrid.planning.plan import Feed


@dataclass
class Owner:
    """Who owns a grid.

    Attributes:
        call: the owning site is named after it.
        kind: input or output.
        shape: of one value on the grid.
        members: all calls whose output lies on it.
    """

    call: Call
    kind: str
    shape: tuple[int, ...]
    members: list[Call] = field(default_factory=list)


class Grids:
    """Grids belong to values: whatever reads a value finds the grid that its producer gave it.

    Values that a runtime joins without arithmetic, the parts of a concatenation, share one grid, and so do the values
    at the same place of calls of the same name. A scheme may ask for more.

    Args:
        neighbours: the computing calls and concatenations that are quantised.
        sums, pools_keep_grid: as in `Scheme`.
    """

    def __init__(self, neighbours: Neighbours, sums: str | None = None, pools_keep_grid: bool = False):
        graph = self.graph = neighbours.graph
        self.chains, self.joins = neighbours.chains, neighbours.joins
        self._neighbours = neighbours
        self._parent: dict[int, int] = {}
        for call in graph.calls:
            if call.name in self.joins:
                for value in call.inputs:
                    self._merge(self._origin(value), call.output)
        for joining in self.chains.values():
            if joining.call.is_sum and sums is not None:
                self._merge_sum(joining, with_result=sums == "all")
            elif joining.call.pools_windows and pools_keep_grid:
                self._merge(self._origin(joining.call.inputs[0]), joining.value)
        for name in (*self.chains, *self.joins):
            first, *others = graph.calls_of(name)
            for other in others:
                for mine, its in zip(first.inputs, other.inputs, strict=True):
                    self._merge(self._origin(mine), self._origin(its))
                chain = self.chains.get(name)
                self._merge(*(call.output if chain is None else chain.value_of(call) for call in (first, other)))

    def feeds(self, name: str) -> tuple[Feed | None, ...]:
        """Where the inputs of the calls of a name get their grids; None for those that stay float."""
        calls = self.graph.calls_of(name)
        feeds: list[Feed | None] = []
        for position, value in enumerate(calls[0].inputs):
            if value in self._neighbours.floats:
                feeds.append(None)
                continue
            origins = [self.graph.origin(call.inputs[position]) for call in calls]
            on_grid = all(exact and self._neighbours.is_produced(origin) for origin, exact in origins)
            feeds.append(Feed(self.owner_of(value), on_grid))
        return tuple(feeds)

    def owner_of(self, value: int) -> str:
        """The site that owns the grid of a value."""
        return self._names[self._root(self._origin(value))]

    def output_of(self, chain: Chain) -> str | None:
        """The site that owns the grid of a chain's output; None where it is a product's that nothing integer reads."""
        return self._names[self._root(chain.value)] if self._neighbours.is_produced(chain.value) else None

    @cached_property
    def owners(self) -> dict[str, Owner]:
        """The owner of each grid, by the name of its site."""
        found: dict[str, Owner] = {}
        for call, kind, value, root in self._uses:
            name = self._names[root]
            owner = found.setdefault(name, Owner(call, kind, self._shape(value)))
            if kind == "output":
                owner.members.append(call)
        return found

    @cached_property
    def _names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for call, kind, _, root in self._uses:
            names.setdefault(root, f"{call.name}.{kind}")
        return names

    @cached_property
    def _uses(self) -> list[tuple[Call, str, int, int]]:
        """Every quantised output, then every input that nobody quantises before, in order: call, kind, value, grid."""
        outputs, inputs = [], []
        for call in self.graph.calls:
            if call.name in self.joins or call.name in self.chains:
                for number, value in enumerate(call.inputs):
                    origin = self._origin(value)
                    if origin not in self._neighbours.floats and not self._neighbours.is_produced(origin):
                        kind = "input" if len(call.inputs) == 1 else f"input{number}"
                        inputs.append((call, kind, value, self._root(origin)))
            if call.name in self.chains:
                value = self.chains[call.name].value_of(call)
                if self._neighbours.is_produced(value):
                    outputs.append((call, "output", value, self._root(value)))
        return outputs + inputs

    def _merge_sum(self, chain: Chain, with_result: bool) -> None:
        """One grid for both operands, unless one stays float, and for the sum."""
        operands = [value for value in chain.call.inputs if value not in self._neighbours.floats]
        values = [self._origin(value) for value in operands] + ([chain.value] if with_result else [])
        for value in values[1:]:
            self._merge(values[0], value)

    def _shape(self, value: int) -> tuple[int, ...]:
        producer = self.graph.producer.get(value)
        return () if producer is None else producer.shape

    def _origin(self, value: int) -> int:
        return self.graph.origin(value)[0]

    def _root(self, value: int) -> int:
        while value in self._parent:
            value = self._parent[value]
        return value

    def _merge(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)
