"""Queries, cached keys and cached values of an attention layer of transformers, each quantised once.

Keys and values are quantised as they enter the cache, so that what a cache holds in generation is what training
computed with; queries where attention is called, by transformers' attention interface. Without a cache, as in training,
keys and values pass the same way. There queries and keys can also be turned, both alike, so that their products stay.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.formats import Affine, Format, NativeGrid
from isogrid.layers.activation_rule import ActivationRule
from isogrid.layers.hadamard import turned
from isogrid.layers.layer import link
from isogrid.layers.stored import StoredInput
from isogrid.quantizers import AbsMax, Quantizer

QUERY, KEY, VALUE = "query_states", "key_cache", "value_cache"
KINDS = (QUERY, KEY, VALUE)
"""The kinds of sites, which are also the last part of their names."""

ATTRIBUTE = "states"
"""The child of an attention layer that holds its quantisers."""

ARGUMENT = "past_key_values"
"""What attention layers of transformers call their cache."""

_PREFIX = "isogrid_"


class RuleQuantizer(Quantizer):
    """A runtime's own rule for what is quantised as it comes, where a quantizer has its place.

    >>> from isogrid.layers.llamacpp_activations import Q8_0
    >>> RuleQuantizer(Q8_0())(torch.full((1, 32), 0.5))[0, 0]
    tensor(0.5000)
    """

    def __init__(self, rule: ActivationRule):
        size: int = getattr(rule.granularity, "size", 1)
        super().__init__(Format(NativeGrid(torch.float32), rule.granularity), (size,), AbsMax(), rule, "dynamic")
        self.rule = rule

    def affine(self, x: Tensor | None = None) -> Affine:
        """None: the rule knows its scales."""
        return Affine(None)

    def extra_repr(self) -> str:
        return f"{self.rule.name}, dynamic"


class AttentionStates(nn.Module):
    """What turns and quantises the states of one attention layer.

    Args:
        quantizers: modules from a tensor [batch, heads, tokens, size] to one of the same shape, by kind. States whose
            kind is missing are not quantised.
        implementation: of attention in transformers, where queries are quantised or turned; else None.
        block: how many channels of queries and keys a Hadamard matrix turns together, before they are quantised
            (QuaRot's R3); 0 leaves them. Checkpoints hold it, so that no plain layer takes their scales.
    """

    def __init__(self, quantizers: Mapping[str, nn.Module], implementation: str | None = None, block: int = 0):
        super().__init__()
        self.implementation, self.block = implementation, block
        if block:
            self.register_buffer("hadamard", torch.tensor([block]))
        for kind, quantizer in quantizers.items():
            self.add_module(kind, quantizer)

    def passed(self, kind: str, x: Tensor) -> Tensor:
        """A state [batch, heads, tokens, size] as attention reads it."""
        quantizer = self._modules.get(kind)
        with torch._C.DisableTorchFunction():  # none of the calls of the forward around
            if self.block and kind != VALUE:
                x = turned(x, self.block)
            result: Tensor = x if quantizer is None else quantizer(x)
            return result

    def to_integer(self) -> nn.Module:
        """The same with the grids as they are stored."""
        stored = {kind: _stored(module) for kind, module in self._modules.items()}
        return StoredStates(stored, self.implementation, self.block)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.implementation is not None:  # a process that only unpickles has registered nothing yet
            attention_for(self.implementation)


class StoredStates(AttentionStates):
    """The states of `isogrid.convert`: `StoredInput` where the scale is stored, else what computes it."""


class DynamicState(nn.Module):
    """A grid whose scale comes from each tensor.

    Args:
        quantizer: that trains it, or trained it; it has no tensors to keep.
    """

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        quantizer.enabled, quantizer.ramping = True, False
        link(self, "quantizer", quantizer.eval())

    @property
    def rule(self) -> ActivationRule | None:
        """The runtime's own, where it is no format's."""
        return getattr(self.quantizer, "rule", None)

    def forward(self, x: Tensor) -> Tensor:
        quantizer: Any = self.quantizer
        return quantizer(x).detach().to(x.dtype)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        quantizer: Any = self.quantizer
        return str(quantizer.extra_repr())


class BeforeCache:
    """Stands for a cache of transformers, or for None, in an attention layer's forward.

    Args:
        cache: what it stands for; all else than writing is left to it.
        others: what a subclass needs.
    """

    def __init__(self, cache: Any, **others: Any):
        self.__dict__.update(cache=cache, **others)

    def before(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """What is written in the place of keys and values [batch, heads, tokens, size]."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, after these were written."""
        cache = self.__dict__["cache"]
        states = self.before(key_states, value_states)
        return states if cache is None else cache.update(*states, *args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """How many tokens the cache holds."""
        cache = self.__dict__["cache"]
        return 0 if cache is None else int(cache.get_seq_length(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["cache"], name, value)


class CacheWriter(BeforeCache):
    """Quantises what is written into a cache, by the `AttentionStates` of a layer."""

    def before(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        states: AttentionStates = self.__dict__["states"]
        return states.passed(KEY, key_states), states.passed(VALUE, value_states)


def attach(module: nn.Module, quantizers: Mapping[str, nn.Module], block: int = 0) -> Callable[[], None]:
    """Let an attention layer of transformers quantise its states, or turn them, by its child `states`.

    Args:
        module: with a cache among the arguments of its forward.
        quantizers, block: as of `AttentionStates`. Where the layer turns its states already, it goes on to.

    Returns:
        What undoes it.
    """
    config: Any = getattr(module, "config", None)
    before = states_before(module)
    states = AttentionStates(quantizers, block=before.block if before is not None else block)
    plain = None if config is None else config._attn_implementation
    if QUERY in quantizers or states.block:
        states.implementation = str(plain or "eager").removeprefix(_PREFIX)
        config._attn_implementation = attention_for(states.implementation)
    module.add_module(ATTRIBUTE, states.train(module.training))
    if before is not None:
        return lambda: module.add_module(ATTRIBUTE, before)
    write = partial(_write_through, cache_position(module) or 0)
    hook = module.register_forward_pre_hook(write, with_kwargs=True)

    def detach() -> None:
        hook.remove()
        del module._modules[ATTRIBUTE]
        if states.implementation is not None:
            config._attn_implementation = plain

    return detach


def quantizes_states(module: nn.Module) -> bool:
    """Whether an attention layer's states are quantised already; to turn them is not to quantise them."""
    return hasattr(module, ATTRIBUTE) and states_before(module) is None


def states_before(module: nn.Module) -> AttentionStates | None:
    """What turns the states of an attention layer whose states are not quantised, or None."""
    states = module._modules.get(ATTRIBUTE)
    return states if isinstance(states, AttentionStates) and not states._modules else None


def cache_position(module: nn.Module) -> int | None:
    """Where the cache stands among the arguments of a module's forward; None where there is none."""
    names = list(inspect.signature(type(module).forward).parameters)
    return names.index(ARGUMENT) - 1 if ARGUMENT in names else None


def replaced_cache(
    position: int, args: tuple[Any, ...], kwargs: dict[str, Any], replace: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an attention layer with another cache.

    Args:
        position: of the cache, where it is given without its name.
        args, kwargs: of the layer's forward.
        replace: the new cache, of the old one or None.

    >>> replaced_cache(1, ("x", None), {}, lambda cache: "cache")
    (('x', 'cache'), {})
    """
    if position < len(args):
        return (*args[:position], replace(args[position]), *args[position + 1 :]), kwargs
    return args, {**kwargs, ARGUMENT: replace(kwargs.get(ARGUMENT))}


def _write_through(position: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A hook before the forward of an attention layer: its states stand before its cache."""
    states: Any = module._modules[ATTRIBUTE]
    return replaced_cache(position, args, kwargs, lambda cache: CacheWriter(cache, states=states))


@cache
def attention_for(implementation: str) -> str:
    """The name of an attention implementation of transformers that quantises queries first; registers it.

    Args:
        implementation: its name in transformers: eager, sdpa, flash_attention_2, ...
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        states = module._modules.get(ATTRIBUTE)
        query = query if states is None else states.passed(QUERY, query)
        own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        original: Any = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own)
        return original(module, query, key, value, *args, **kwargs)

    name = _PREFIX + implementation
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _stored(module: nn.Module | None) -> nn.Module:
    assert isinstance(module, Quantizer)
    if module.scale_rule == "dynamic":
        return DynamicState(module)
    return StoredInput(module.format, module.stored())
