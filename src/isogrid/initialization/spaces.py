"""The spaces of a network that can be turned: what one layer writes turned, another reads turned back.

Two kinds are found. The residual stream is what sums join: embeddings and the ends of the blocks write it, and layers
behind norms read it. The values of attention lie between the layer that makes them and the one that reads their
weighted means, one space for each head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from isogrid.errors import PlanError
from isogrid.initialization.network import Network
from isogrid.planning.graph import Call


@dataclass(frozen=True)
class Space:
    """Channels that can be turned together.

    Attributes:
        name: of the first layer that writes a stream, or of the layer that makes an attention's values.
        size: how many channels one rotation turns; a layer of more has it several times.
        tables: paths of the embeddings that write it.
        writers, readers: paths of the linear layers that write and read it.
        tied: paths of the layers that share the weight of a table; they are turned with it, and not among the others.
        norms: paths of the norms inside, whose gains have to move into their readers first.
        keeps_mean: whether a norm inside subtracts the mean.
    """

    name: str
    size: int
    tables: tuple[str, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    tied: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    keeps_mean: bool = False


def spaces_of(network: Network) -> tuple[list[Space], list[tuple[str, str]]]:
    """The spaces of a network, and the streams and values that cannot be turned, with the reason."""
    found: list[Space] = []
    kept: list[tuple[str, str]] = []
    for each in (*_streams(network), *_values_of_attention(network)):
        if isinstance(each, Space):
            found.append(each)
        else:
            kept.append(each)
    return found, kept


def nothing_turns(kept: Sequence[tuple[str, str]]) -> PlanError:
    """The error for a network without spaces, with the reasons."""
    return PlanError("Nothing in the model can be turned." + "".join(f" {name}: {why}." for name, why in kept))


@dataclass
class _Stream:
    """Values that sums join, while they are collected."""

    network: Network
    size: int
    writers: list[Call] = field(default_factory=list)
    readers: list[Call] = field(default_factory=list)
    norms: list[Call] = field(default_factory=list)
    why_not: str = ""

    @property
    def name(self) -> str:
        return self.writers[0].name

    def space(self) -> Space | tuple[str, str]:
        """The space, or its name and why it cannot be turned."""
        tables = [call for call in self.writers if call.kind == "embedding"]
        tied = {use.name for call in tables for use in self.network.uses(call)}
        layers = [call for call in (*self.writers, *self.readers) if call.name not in tied]
        twice = next((call.name for call in layers if self.network.is_used_twice(call)), None)
        why = self.why_not or (f"{twice} is used twice" if twice else "") or self._why_gains_stay(tied)
        if why or not self.readers:
            return self.name, why or "no layer reads it"
        writers = (call.name for call in self.writers if call.kind != "embedding")
        return Space(
            self.name,
            self.size,
            tuple(dict.fromkeys(call.name for call in tables)),
            tuple(dict.fromkeys(writers)),
            tuple(dict.fromkeys(call.name for call in self.readers if call.name not in tied)),
            tuple(tied.difference(call.name for call in tables)),
            tuple(dict.fromkeys(call.name for call in self.norms)),
            any(self.network.norms[call.name].centers for call in self.norms),
        )

    def _why_gains_stay(self, tied: set[str]) -> str:
        for call in self.norms:
            norm = self.network.norms[call.name]
            has_bias = norm.bias is not None and bool(norm.bias.any())
            if len(self.network.graph.calls_of(call.name)) > 1:
                return f"{call.name} is used twice"
            for reader in self.network.readers(call.output):
                if has_bias and self.network.module(reader.name).bias is None:
                    return f"the bias of {call.name} cannot move into {reader.name}, which has none"
                if reader.name in tied and not bool((norm.gain == 1).all()):
                    return (
                        f"the gain of {call.name} cannot move into {reader.name}, which shares its weight with an "
                        f"embedding; give it a copy, {reader.name}.weight = nn.Parameter({reader.name}.weight.clone()),"
                        " and a model of transformers config.tie_word_embeddings = False"
                    )
        return ""


def _streams(network: Network) -> Iterator[Space | tuple[str, str]]:
    """The residual streams: the values joined by sums, from one that a layer writes on."""
    seen: set[int] = set()
    for call in network.graph.calls:
        if call.is_plain_sum and call.output not in seen:
            members = _joined(network, call.output)
            seen |= members
            writers = [c for c in network.graph.calls if c.output in members and c.kind in ("embedding", "linear")]
            if writers and any(_is_read_by_norm(network, value) for value in members):
                stream = _Stream(network, call.shape[-1])
                for value in sorted(members):
                    _look(network, stream, value)
                yield stream.space()


def _joined(network: Network, start: int) -> set[int]:
    """The values that sums and moves join with one, in both directions."""
    members, ahead = set[int](), [start]
    while ahead:
        value = ahead.pop()
        if value in members:
            continue
        members.add(value)
        call = network.graph.producer.get(value)
        if call is not None and _joins(network, call):
            ahead += call.inputs
        for reader in network.graph.consumers.get(value, []):
            if _joins(network, reader):
                ahead += [*reader.inputs, *reader.outputs]
    return members


def _joins(network: Network, call: Call) -> bool:
    return call.is_plain_sum or network.keeps_channels(call)


def _is_read_by_norm(network: Network, value: int) -> bool:
    return any(reader.kind == "norm" for reader in network.graph.consumers.get(value, []))


def _look(network: Network, stream: _Stream, value: int) -> None:
    """Add what makes and reads a value to its stream, or say why the stream cannot be turned."""
    call = network.graph.producer.get(value)
    if value in network.graph.model_outputs:
        stream.why_not = "it leaves the model"
    elif call is None:
        stream.why_not = "something that no layer makes is added to it"
    elif call.kind == "embedding" or network.is_linear(call):
        stream.writers.append(call)
    elif not _joins(network, call):
        stream.why_not = f"{call.name} writes it, which no rotation passes through"
    for reader in network.graph.consumers.get(value, []):
        if network.is_linear(reader):
            stream.readers.append(reader)
        elif reader.kind == "norm":
            _look_behind(network, stream, reader)
        elif not _joins(network, reader):
            stream.why_not = f"{reader.name} reads it, which no rotation passes through"


def _look_behind(network: Network, stream: _Stream, norm: Call) -> None:
    readers = list(network.readers(norm.output))
    if network.leaves(norm.output):
        stream.why_not = f"what {norm.name} makes of it leaves the model"
    elif not readers or not all(network.is_linear(reader) for reader in readers):
        other = next((reader.name for reader in readers if not network.is_linear(reader)), "nothing")
        stream.why_not = f"what {norm.name} makes of it is read by {other}, which cannot take in the gain"
    stream.norms.append(norm)
    stream.readers += readers


def _values_of_attention(network: Network) -> Iterator[Space | tuple[str, str]]:
    """The spaces between value and output layers."""
    graph = network.graph
    for call in graph.calls:
        if call.kind != "matmul" or len(call.inputs) != 2:
            continue
        maker, readers = graph.producer.get(graph.origin(call.inputs[1])[0]), list(graph.readers(call.output))
        if maker is None or not network.is_linear(maker) or len(readers) != 1 or not network.is_linear(readers[0]):
            continue
        size, heads = call.shape[-1], call.shape[1] if len(call.shape) == 4 else 0
        shared, rest = divmod(maker.shape[-1], size)
        if rest or not heads or heads % shared:
            yield maker.name, "its values are not those of whole heads"
        elif network.is_used_twice(maker) or network.is_used_twice(readers[0]):
            yield maker.name, "it or what reads it is used twice"
        else:
            yield Space(maker.name, size, (), (maker.name,), (readers[0].name,))
