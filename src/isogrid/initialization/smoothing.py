"""SmoothQuant: what sticks out in activations moves into the weights (Xiao et al., arXiv 2211.10438).

A layer's input channel divided by a factor, and the layer's weights of that channel multiplied by it, leave the product
as it is. The division goes into whatever makes the channel: the gain of a norm, the rows of a linear layer.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isogrid.errors import NonFiniteError, NotCalibratedError, PlanError
from isogrid.initialization.network import ExampleInputs, Network, network_of, unless_it_differs
from isogrid.initialization.rewriting import Rewriting
from isogrid.layers.clamp import Clamp
from isogrid.planning.arguments import Arguments, arguments_of
from isogrid.planning.batches import filled_batches, run_batch
from isogrid.planning.evaluating import evaluating
from isogrid.planning.graph import Call
from isogrid.planning.rules import nearest

RELU = Clamp(0.0)
SMALLEST = 1e-5
"""Factors are at least this, as in SmoothQuant's own code."""


class _Channel(NamedTuple):
    """Channels that can be smoothed: who makes them, and the linear layers that read them."""

    maker: str
    readers: tuple[str, ...]


def smooth(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    example_inputs: ExampleInputs,
    alpha: float = 0.5,
    match: str = "*",
) -> Rewriting:
    """Move the large channels of activations into weights, in place; the model computes what it did before.

    The factor of channel j is `max|X_j| ** alpha / max|W_j| ** (1 - alpha)`; what makes the channel is divided by it:
    a LayerNorm or RMSNorm, or a linear layer, also one before a ReLU or a product such as `silu(gate) * up`.

    Args:
        model: float, not prepared.
        batches: of data, as for `isogrid.calibrate`.
        example_inputs: as for `isogrid.plan`.
        alpha: 0 leaves weights equally large, 1 activations; large language models take 0.5 to 0.8.
        match: names of the linear layers to smooth, wildcards allowed. Layers that read the same channels go together.

    Returns:
        What was changed, and the layers that were not, with the reason.

    Raises:
        PlanError: the model is prepared, no layer matches, or alpha is not in [0, 1].
        CaptureError: the model does not run on the example inputs, or the change does not cancel out.
        NotCalibratedError: there are no batches, one is empty, or a layer saw nothing.
        NonFiniteError: an activation or a weight holds NaN or infinity.

    In each case the model is as it was.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    >>> x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    >>> print(smooth(model, [x], example_inputs=(x,)))
    smoothed 0: 1
    """
    if not 0 <= alpha <= 1:
        raise PlanError(f"alpha is {alpha}. It is a share, from 0 to 1.")
    arguments = arguments_of(model, example_inputs)
    with network_of(model, example_inputs) as network:
        found, kept = _channels(network, match)
        largest = _largest_inputs(model, batches, arguments, found)
        with unless_it_differs(model, example_inputs):
            for channel in found:
                _smooth(network, channel, largest[channel], alpha)
    return Rewriting(tuple(("smoothed", c.maker, ", ".join(c.readers)) for c in found), tuple(kept))


def _channels(network: Network, match: str) -> tuple[list[_Channel], list[tuple[str, str]]]:
    """What can be smoothed, and which of the layers that match cannot, with the reason."""
    linears = [call for call in network.graph.calls if call.kind == "linear"]
    wanted = {call.name for call in linears if fnmatchcase(call.name, match)}
    if not wanted:
        names = [call.name for call in linears]
        raise PlanError(f"match={match!r} is the name of no linear layer.{nearest(match, names)}")
    found: dict[int, _Channel] = {}
    kept: dict[str, str] = {}
    for call in linears:
        value = network.source(call.inputs[0])
        if call.name in wanted and value not in found:
            maker, why = _maker(network, value)
            why = why or _why_not_readers(network, value)
            if why:
                kept[call.name] = why
            else:
                found[value] = _Channel(maker, tuple(dict.fromkeys(reader.name for reader in network.readers(value))))
    return list(found.values()), list(kept.items())


def _maker(network: Network, value: int) -> tuple[str, str]:
    """The norm or linear layer whose output channels a value's are, or why there is none."""
    call = network.graph.producer.get(value)
    if call is None:
        return "", "its input comes from outside the model"
    if call.kind == "norm" or network.is_linear(call):
        why = f"{call.name}, which makes its input, is used twice" if network.is_used_twice(call) else ""
        return call.name, why
    if call.kind == "clamp" and call.clamp == RELU:
        return _alone(network, call, call.inputs[0])
    if call.kind == "multiply" and len(call.inputs) == 2:
        for operand in call.inputs:
            maker, why = _alone(network, call, operand)
            if not why:
                return maker, ""
    return "", f"its input comes from {call.name}, which no factor passes through"


def _alone(network: Network, reader: Call, value: int) -> tuple[str, str]:
    """The maker of a value that one call reads and nothing else."""
    source = network.source(value)
    if [call.name for call in network.readers(source)] != [reader.name] or network.leaves(source):
        return "", f"what goes into {reader.name} is read elsewhere too"
    if network.width(source) != network.width(reader.output):
        return "", f"{reader.name} spreads its operand"
    maker, why = _maker(network, source)
    return maker, why


def _why_not_readers(network: Network, value: int) -> str:
    if network.leaves(value):
        return "its input leaves the model"
    for call in network.readers(value):
        if not network.is_linear(call):
            return f"its input is read by {call.name} too"
        if network.is_used_twice(call):
            return f"{call.name} is used twice, or shares its weight"
    return ""


@torch.no_grad()
def _smooth(network: Network, channel: _Channel, largest: Tensor, alpha: float) -> None:
    readers = [network.module(path).weight.detach() for path in channel.readers]
    weights = torch.stack([columns.double().abs().flatten(0, -2).amax(0) for columns in readers]).amax(0)
    if not weights.isfinite().all():
        raise NonFiniteError(f"A weight of {', '.join(channel.readers)} holds NaN or infinity.")
    factors = (largest**alpha / weights.clamp(min=SMALLEST) ** (1 - alpha)).clamp(min=SMALLEST)
    factors = torch.where((largest > 0) & (weights > 0), factors, 1.0)
    for columns in readers:
        columns.copy_(columns.double() * factors)
    norm = network.norms.get(channel.maker)
    if norm is not None:
        norm.scale(1 / factors)
    else:
        maker = network.module(channel.maker)
        rows = maker.weight.detach()
        rows.copy_(rows.double() / factors[:, None])
        if maker.bias is not None:
            maker.bias.copy_(maker.bias.double() / factors)


def _largest_inputs(
    model: nn.Module, batches: Iterable[Any], arguments: Arguments, channels: list[_Channel]
) -> dict[_Channel, Tensor]:
    """The largest magnitudes in channels, float64 [channels]."""
    largest: dict[_Channel, Tensor] = {}
    with evaluating(model), torch.no_grad(), _watching(model, channels, largest):
        for batch in filled_batches(batches, "to see activations in"):
            run_batch(model, batch, arguments)
    for channel in channels:
        if channel not in largest:
            raise NotCalibratedError(f"{channel.readers[0]} saw nothing in the batches. Pass some that reach it.")
        if not largest[channel].isfinite().all():
            raise NonFiniteError(f"NaN or infinity flows into {channel.readers[0]}.")
    return largest


@contextmanager
def _watching(model: nn.Module, channels: list[_Channel], largest: dict[_Channel, Tensor]) -> Iterator[None]:
    def see(channel: _Channel) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found = args[0].double().abs().flatten(0, -2)
            if len(found):
                found = found.amax(0)
                largest[channel] = torch.maximum(largest[channel], found) if channel in largest else found

        return hook

    # Not every reader runs by itself: a product by a parameter of the module around it is called as a function.
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(see(channel))
        for channel in channels
        for path in channel.readers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
