"""QuaRot: rotations inside a network that cancel out (Ashkboos et al., arXiv 2404.00456).

What one layer writes is turned and what the next one reads is turned back, both in their weights, so that the model
computes what it did before, on activations without outliers. Where something between two layers does not commute with
rotations, a layer can turn its input while it runs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from isogrid.errors import PlanError
from isogrid.initialization.network import ExampleInputs, Network, network_of, unless_it_differs
from isogrid.initialization.orthogonal import random_rotation, rotation_around_the_mean
from isogrid.initialization.rewriting import Rewriting
from isogrid.initialization.spaces import Space, nothing_turns, spaces_of
from isogrid.layers.attention_states import ATTRIBUTE, QUERY, attach
from isogrid.layers.hadamard import HadamardLinear, block_for, turned
from isogrid.layers.layer import replacement
from isogrid.planning.exchange import exchange
from isogrid.planning.rules import nearest


def rotate(
    model: nn.Module,
    *,
    example_inputs: ExampleInputs,
    online: str | Sequence[str] = (),
    attention: str | Sequence[str] = (),
    block: int | None = None,
    seed: int = 0,
    rotations: Mapping[str, Tensor] | None = None,
) -> Rewriting:
    """Turn the channels of a model, in place; the model computes what it did before.

    Turned are the residual stream and the values of attention (QuaRot's R1 and R2), which costs nothing when the model
    runs, and is kept by every target; the input of the layers that `online` names (R4), which becomes a
    `HadamardLinear`; and the queries and keys of those that `attention` names (R3), behind the rotary embedding, so
    that the cache holds turned keys. The gains of norms move into the layers that read them. A stream with LayerNorms
    is turned around its mean, which they subtract.

    Args:
        model: float, not prepared.
        example_inputs: as for `isogrid.plan`.
        online: names of nn.Linear layers, wildcards allowed, such as `*.down_proj`. Targets that cannot compute
            them say so when the model is exported.
        attention: names of attention layers of transformers, wildcards allowed, such as `*.self_attn`. Targets but
            `pytorch` refuse them when the model is planned.
        block: how many channels those of `online` turn together; 128 if that divides them. Heads are turned by the
            largest power of two up to 128 that divides them.
        seed: of the random rotations.
        rotations: orthogonal [size, size] by the name of the space, such as those of `isogrid.learn_rotations`;
            spaces without one get a random one.

    Returns:
        What was changed, and what cannot be turned, with the reason.

    Raises:
        PlanError: the model is prepared, nothing in it can be turned, `online` matches no Linear, `attention` no
            attention layer or one that is turned already, or a rotation is of no space or not orthogonal.
        CaptureError: the model does not run on the example inputs, or the change does not cancel out.

    In each case the model is as it was.

    >>> import isogrid as ig
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
    ...     def forward(self, x):
    ...         return x + self.down(self.up(self.norm(x)).relu())
    >>> model = nn.Sequential(nn.Linear(4, 8), Block(), nn.RMSNorm(8), nn.Linear(8, 2))
    >>> print(rotate(model, example_inputs=(torch.ones(1, 4),), online="*.down"))
    turned 0: 0, 1.down; back in 1.up, 3
    turned online 1.down: by blocks of 16
    """
    patterns, heads = ([each] if isinstance(each, str) else list(each) for each in (online, attention))
    generator = Generator().manual_seed(seed)
    with network_of(model, example_inputs) as network:
        spaces, kept = spaces_of(network)
        if not spaces and not patterns and not heads:
            raise nothing_turns(kept)
        chosen = chosen_rotations(spaces, rotations or {}, generator)
        with unless_it_differs(model, example_inputs) as undo:
            for space in spaces:
                move_gains(network, space)
            for path, turn in turns_of(spaces).items():
                _turn(network.module(path), turn, chosen)
            changed = [
                ("turned", space.name, f"{', '.join(space.tables + space.writers)}; back in {', '.join(space.readers)}")
                for space in spaces
            ]
            changed += [("turned online", name, how) for name, how in _turn_online(model, patterns, block)]
            changed += [("turned online", name, how) for name, how in _turn_attention(network, heads, undo)]
    return Rewriting(tuple(changed), tuple(kept))


class Turn(NamedTuple):
    """By the rotations of which spaces a weight [out, in] is turned.

    Attributes:
        rows: of what the layer writes.
        columns: of what it reads; of what an embedding writes.
    """

    rows: str | None = None
    columns: str | None = None


def turns_of(spaces: Sequence[Space]) -> dict[str, Turn]:
    """The turns of every layer, by path."""
    found: dict[str, Turn] = {}
    for space in spaces:
        for path in space.writers:
            found[path] = found.get(path, Turn())._replace(rows=space.name)
        for path in (*space.tables, *space.readers):
            found[path] = found.get(path, Turn())._replace(columns=space.name)
    return found


def turned_weight(weight: Tensor, turn: Turn, rotations: Mapping[str, Tensor]) -> Tensor:
    """A weight [..., out, in] turned, in the dtype of the rotations.

    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> turned_weight(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), Turn(columns="x"), {"x": swap})
    tensor([[2., 1.],
            [4., 3.]])
    """
    for name, dimension in ((turn.columns, -1), (turn.rows, -2)):
        if name is not None:
            rotation = rotations[name]
            last = weight.to(rotation.dtype).transpose(-1, dimension)
            last = (last.reshape(*last.shape[:-1], -1, len(rotation)) @ rotation).reshape(last.shape)
            weight = last.transpose(-1, dimension)
    return weight


def chosen_rotations(spaces: Sequence[Space], given: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """The rotation of every space, float64: the given one, or a random one.

    Raises:
        PlanError: one is given for no space, or does not fit.
    """
    sizes = {space.name: space.size for space in spaces}
    for name, rotation in given.items():
        if name not in sizes:
            raise PlanError(f"rotations has {name!r}, which is no space of the model.{nearest(name, sizes)}")
        unit = torch.eye(sizes[name], dtype=torch.float64)
        fits = rotation.shape == unit.shape
        if not fits or not torch.allclose(rotation.double().cpu() @ rotation.double().cpu().T, unit, atol=1e-4):
            raise PlanError(f"The rotation of {name!r} is not an orthogonal matrix [{sizes[name]}, {sizes[name]}].")
    made = {}
    for space in spaces:
        make = rotation_around_the_mean if space.keeps_mean else random_rotation
        made[space.name] = given[space.name].double() if space.name in given else make(space.size, generator)
    return made


@torch.no_grad()
def move_gains(network: Network, space: Space) -> None:
    """Move gains and biases of the norms in a space into the layers that read them."""
    for path in space.norms:
        norm = network.norms[path]
        gain, bias = norm.gain.double(), norm.bias
        for call in network.readers(network.graph.calls_of(path)[0].output):
            layer = network.module(call.name)
            if bias is not None and bool(bias.any()):
                layer.bias.copy_(layer.bias.double() + layer.weight.double() @ bias.double())
            if not bool((gain == 1).all()):
                layer.weight.detach().copy_(layer.weight.double() * gain)
        norm.clear()


@torch.no_grad()
def _turn(layer: Any, turn: Turn, rotations: Mapping[str, Tensor]) -> None:
    layer.weight.detach().copy_(turned_weight(layer.weight.double(), turn, rotations))
    if turn.rows is not None and layer.bias is not None:
        layer.bias.copy_(turned_weight(layer.bias.double(), Turn(columns=turn.rows), rotations))


@torch.no_grad()
def _turn_online(model: nn.Module, patterns: Sequence[str], block: int | None) -> Iterator[tuple[str, str]]:
    """Put layers that turn their input in the places of some of a model's."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise PlanError(f"online={pattern!r} is the name of no nn.Linear.{nearest(pattern, linears)}")
    for name, linear in linears.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            new = replacement(linear, HadamardLinear)
            new.turn_by(block_for(linear.in_features, block))
            new.weight.copy_(turned(new.weight.double(), new.block))
            exchange(model, {linear: new})
            yield name, f"by blocks of {new.block}"


def _turn_attention(
    network: Network, patterns: Sequence[str], undo: list[Callable[[], None]]
) -> Iterator[tuple[str, str]]:
    """Let attention layers turn their queries and keys."""
    queries = {call.scope: call for call in network.graph.states if call.kind == QUERY}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in queries):
            raise PlanError(
                f"attention={pattern!r} is the name of no attention layer of transformers that calls its attention "
                f"interface and keeps a cache.{nearest(pattern, queries)}"
            )
    for name, call in queries.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            if hasattr(network.module(name), ATTRIBUTE):
                raise PlanError(f"{name!r} has an attribute {ATTRIBUTE!r} already: it is turned, or the name is taken.")
            block = block_for(call.shape[-1])
            undo.append(attach(network.module(name), {}, block))
            yield name, f"queries and keys, by blocks of {block}"
