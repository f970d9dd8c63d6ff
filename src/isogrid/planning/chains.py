"""Chains: a computing call with the batch norm and the clamp behind it, which it does itself."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from isogrid.planning.graph import COMPUTING_KINDS, Call, Graph


@dataclass
class Chain:
    """A computing call with what it absorbs.

    Attributes:
        call: the computing call, the first of its name.
        batch_norm, clamp: what it absorbs, or None.
    """

    call: Call
    batch_norm: Call | None = None
    clamp: Call | None = None

    @property
    def value(self) -> int:
        """What comes out at the end."""
        return (self.clamp or self.batch_norm or self.call).output


def find_chains(graph: Graph, names: Collection[str]) -> dict[str, Chain]:
    """The chains of the computing calls of these names, by name.

    A layer that is used twice absorbs nothing: what follows may differ. A clamp that is used more than once is absorbed
    everywhere or nowhere, for it cannot be told apart while the model runs.
    """
    chains: dict[str, Chain] = {}
    for call in graph.calls:
        if call.name not in names or call.kind not in COMPUTING_KINDS or call.name in chains:
            continue
        chain = chains[call.name] = Chain(call)
        if len(graph.calls_of(call.name)) > 1:
            continue
        follower = graph.only_consumer(chain.value)
        if follower is not None and _can_absorb(graph, call, follower):
            chain.batch_norm = follower
            follower = graph.only_consumer(chain.value)
        if follower is not None and follower.kind == "clamp":
            chain.clamp = follower
    absorbed = Counter(chain.clamp.name for chain in chains.values() if chain.clamp)
    for chain in chains.values():
        if chain.clamp and absorbed[chain.clamp.name] < len(graph.calls_of(chain.clamp.name)):
            chain.clamp = None
    return chains


def _can_absorb(graph: Graph, call: Call, follower: Call) -> bool:
    if follower.kind != "batch_norm" or call.kind not in ("linear", "convolution"):
        return False
    once = len(graph.calls_of(follower.name)) == 1
    channels_are_last = call.kind == "linear" and len(call.shape) > 2
    return once and not channels_are_last
