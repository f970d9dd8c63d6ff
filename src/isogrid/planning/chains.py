"""Chains: a computing call with the batch norm and the clamp behind it, which it does itself."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from isogrid.planning.graph import COMPUTING_KINDS, Call, Graph


@dataclass
class Chain:
    """The calls of a layer or operation with what they absorb.

    Attributes:
        calls: all of one name.
        norms, clamps: what each of them absorbs; empty where they absorb none.
    """

    calls: list[Call]
    norms: list[Call] = field(default_factory=list)
    clamps: list[Call] = field(default_factory=list)

    @property
    def call(self) -> Call:
        """The first call."""
        return self.calls[0]

    @property
    def batch_norm(self) -> Call | None:
        """What the first call absorbs."""
        return self.norms[0] if self.norms else None

    @property
    def clamp(self) -> Call | None:
        """What the first call absorbs."""
        return self.clamps[0] if self.clamps else None

    @property
    def value(self) -> int:
        """What comes out at the end of the first call."""
        return self.value_of(self.calls[0])

    def value_of(self, call: Call) -> int:
        """What comes out at the end of one of the calls."""
        number = next(number for number, other in enumerate(self.calls) if other is call)
        return (self.clamps or self.norms or self.calls)[number].output


def find_chains(graph: Graph, names: Collection[str]) -> dict[str, Chain]:
    """The chains of the computing calls of these names, by name.

    A layer that is used twice absorbs what follows it each time, if that is the same. A clamp that is used more than
    once is absorbed everywhere or nowhere, for it cannot be told apart while the model runs.
    """
    chains: dict[str, Chain] = {}
    for call in graph.calls:
        if call.name in names and call.kind in COMPUTING_KINDS and call.name not in chains:
            chain = chains[call.name] = Chain(graph.calls_of(call.name))
            chain.norms = _norms(graph, chain)
            chain.clamps = _clamps(graph, chain)
    while dropped := [chain for chain in chains.values() if not _absorbs_all(graph, chain, chains)]:
        for chain in dropped:
            chain.clamps = []
    return chains


def _followers(graph: Graph, chain: Chain, kind: str) -> list[Call]:
    """The only reader of each call's value; nothing where one has another kind of reader, or several."""
    found = [graph.only_consumer(chain.value_of(call)) for call in chain.calls]
    return [follower for follower in found if follower is not None and follower.kind == kind]


def _norms(graph: Graph, chain: Chain) -> list[Call]:
    followers = _followers(graph, chain, "batch_norm")
    if chain.call.kind not in ("linear", "convolution") or len(followers) < len(chain.calls):
        return []
    name = followers[0].name
    is_one = all(follower.name == name for follower in followers) and len(graph.calls_of(name)) == len(followers)
    channels_are_last = chain.call.kind == "linear" and len(chain.call.shape) > 2
    return followers if is_one and not channels_are_last else []


def _clamps(graph: Graph, chain: Chain) -> list[Call]:
    readers = [_reader(graph, chain.value_of(call)) for call in chain.calls]
    followers = [reader for reader in readers if reader is not None and reader.kind == "clamp"]
    is_one = len(followers) == len(chain.calls) and len({follower.clamp for follower in followers}) == 1
    return followers if is_one else []


def _reader(graph: Graph, value: int) -> Call | None:
    """The only reader of a value, or the one behind pooling.

    The largest of clamped values is the largest value, clamped, so that `relu(max_pool(conv(x)))` is a layer too.
    Behind a view it would not do: a clamp in place must reach the tensor that is looked at.
    """
    reader = graph.only_consumer(value)
    while reader is not None and reader.kind == "pass" and "max_pool" in reader.type and len(reader.outputs) == 1:
        reader = graph.only_consumer(reader.output)
    return reader


def _absorbs_all(graph: Graph, chain: Chain, chains: dict[str, Chain]) -> bool:
    absorbed = Counter(clamp.name for other in chains.values() for clamp in other.clamps)
    return all(absorbed[clamp.name] == len(graph.calls_of(clamp.name)) for clamp in chain.clamps)


def fused_additions(graph: Graph, chains: Mapping[str, Chain]) -> dict[str, int]:
    """For each addition that the layer before it can compute, the value which that layer does not round.

    Where both sides come straight from a layer, the later one computes the addition.
    """
    layers = {chain.value: chain for chain in chains.values() if chain.call.kind in ("linear", "convolution")}
    order = {call.name: number for number, call in enumerate(graph.calls)}
    found = {}
    for name, chain in chains.items():
        calls = graph.calls_of(name)
        if chain.call.kind != "add" or len(calls) > 1 or len(chain.call.inputs) < 2:
            continue
        fusible = [
            value
            for value in dict.fromkeys(chain.call.inputs)
            if value in layers
            and layers[value].clamp is None
            and len(graph.calls_of(layers[value].call.name)) == 1
            and layers[value].call.shape == chain.call.shape
            and graph.only_consumer(value) is chain.call
        ]
        if fusible:
            found[name] = max(fusible, key=lambda value: order[layers[value].call.name])
    return found


def nonnegative(graph: Graph, chains: Mapping[str, Chain]) -> set[str]:
    """The names of the calls in chains whose results are never negative: behind a ReLU, and averages of such."""
    found: set[str] = set()
    made = {chain.value_of(call): name for name, chain in chains.items() for call in chain.calls}
    for name, chain in chains.items():
        clamp = None if chain.clamp is None else chain.clamp.clamp
        clamped = clamp is not None and clamp.low is not None and clamp.low >= 0
        pools = chain.call.kind == "average_pool" and all(
            made.get(graph.origin(call.inputs[0])[0]) in found for call in chain.calls
        )
        if clamped or pools:
            found.add(name)
    return found
