"""Mixtures of experts: what checkpoints of transformers call stacked weights, and what converters make of them."""

import re
from typing import Any

_STACK = re.compile(
    r"(?:(?P<stem>.*\.))?(?P<name>gate_up|up|down)_proj(?:_(?P<bias>bias)|ection\.(?P<end>weight|bias))?"
)
"""A stack: a parameter of the module of experts, or the quantised product that borrows it."""


def is_stack(name: str) -> bool:
    """Whether a parameter of this name holds a matrix, or a bias, of each expert.

    >>> is_stack("gate_up_proj"), is_stack("down_proj_bias"), is_stack("weight")
    (True, True, False)
    """
    return _STACK.fullmatch(name) is not None


def stack_of(source: str) -> tuple[str, ...]:
    """The name that gguf's tables know a stack of experts by; empty where a tensor is none.

    >>> stack_of("layers.0.mlp.experts.down_projection.weight"), stack_of("layers.0.mlp.down_proj.weight")
    (('layers.0.mlp.experts.down_proj.weight',), ())
    """
    found = _STACK.fullmatch(source)
    if found is None or not (found["stem"] or "").endswith(".experts."):
        return ()
    return (f"{found['stem']}{found['name']}_proj.{found['end'] or found['bias'] or 'weight'}",)


def halves_of(source: str) -> tuple[str, ...]:
    """The names of the two that converters make of gates stacked with what they gate; empty for other tensors.

    >>> halves_of("mlp.experts.gate_up_proj_bias")
    ('mlp.experts.gate_proj.bias', 'mlp.experts.up_proj.bias')
    """
    name = "".join(stack_of(source))
    return tuple(name.replace("gate_up_proj", half) for half in ("gate_proj", "up_proj")) if "gate_up" in name else ()


def experts_in(config: Any) -> int:
    """How many experts a layer of a model has, by its configuration; 0 where it has none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)
