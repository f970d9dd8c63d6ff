"""Queries, cached keys and cached values of attention layers: found while a model runs, and planned for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from isogrid.errors import PlanError, TargetError
from isogrid.formats import PerHead, PerTensor, named_format
from isogrid.layers.attention_states import (
    ATTRIBUTE,
    KEY,
    QUERY,
    VALUE,
    BeforeCache,
    cache_position,
    quantizes_states,
    replaced_cache,
    states_before,
)
from isogrid.planning.graph import COMPUTING_KINDS, JOINING_KINDS, Call, Graph
from isogrid.planning.plan import Site, StatePlan
from isogrid.planning.rules import Rule
from isogrid.planning.target import StateChoice, Target


@dataclass
class PlannedStates:
    """What becomes of the states of a model.

    Attributes:
        sites, plans: of those that are quantised.
        floats: name and reason of the others.
        used: the rules that decided, by their numbers.
    """

    sites: list[Site] = field(default_factory=list)
    plans: list[StatePlan] = field(default_factory=list)
    floats: dict[str, str] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)


@contextmanager
def states_of(model: nn.Module) -> Iterator[list[Call]]:
    """While open, runs of a model fill the list with the states of its attention layers.

    These are the layers of transformers that write keys and values into a cache given as `past_key_values`; without
    one, the causal ones that would.
    """
    found: list[Call] = []
    hooks = []
    for path, module in model.named_modules():
        position = cache_position(module)
        if position is not None and "update" in _names(module):
            watch = _watching(path, module, position, found)
            hooks.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _watching(path: str, module: nn.Module, position: int, found: list[Call]) -> Any:
    def replace(cache: Any) -> Any:
        if type(cache).__name__ == "EncoderDecoderCache" or (cache is None and not _is_causal(module)):
            return cache
        return _Seen(cache, path=path, module=module, found=found)

    return lambda _, args, kwargs: replaced_cache(position, args, kwargs, replace)


def _is_causal(module: nn.Module) -> bool:
    config: Any = getattr(module, "config", None)
    return bool(getattr(module, "is_causal", False)) and not getattr(config, "is_encoder_decoder", False)


def _names(module: nn.Module) -> tuple[str, ...]:
    """The names that a module's own forward reads."""
    code: Any = getattr(type(module).forward, "__code__", None)
    return () if code is None else tuple(code.co_names)


class _Seen(BeforeCache):
    """Writes down what is written into a cache, while a model is captured."""

    def before(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        path, module, found = (self.__dict__[name] for name in ("path", "module", "found"))
        shapes = {KEY: tuple(key_states.shape), VALUE: tuple(value_states.shape)}
        if "ALL_ATTENTION_FUNCTIONS" in _names(module):
            groups = int(getattr(module, "num_key_value_groups", 1))
            batch, heads, tokens, size = key_states.shape
            shapes = {QUERY: (batch, heads * groups, tokens, size), **shapes}
        known = {call.name for call in found}
        for kind, shape in shapes.items():
            call = Call(f"{path}.{kind}".lstrip("."), kind, type(module).__name__, path, (), (), shape)
            if call.name not in known:
                found.append(call)
        return key_states, value_states


def plan_states(model: nn.Module, graph: Graph, rules: Sequence[Rule], target: Target) -> PlannedStates:
    """What becomes of the states of a model: they are quantised where a rule names them.

    A pattern that matches a layer too, such as `*`, is none for them.

    Raises:
        PlanError: a rule asks for what states do not have, or for nothing.
        TargetError: the target cannot do what rules ask for, or what the model does to its states.
    """
    turning = next((name for name, module in model.named_modules() if states_before(module) is not None), None)
    if turning is not None and (target.attention is None or not target.attention.turns_states):
        raise TargetError(
            f"{turning!r} turns its queries and keys by a Hadamard matrix while it runs, and {target.name} has no such "
            "step. Rotate without attention=; rotations inside the weights are kept."
        )
    asked: dict[str, tuple[Rule, Call]] = {}
    found = PlannedStates()
    for call in graph.states:
        index = next((i for i, rule in enumerate(rules) if _is_for(rule, call, graph)), None)
        if index is None:
            continue
        rule = rules[index]
        found.used.add(index)
        if rule.keep == "float":
            found.floats[call.name] = f"rule {rule.match!r}"
            continue
        _check(rule, call, model)
        asked[call.name] = rule, call
    if target.attention is None:
        if asked:
            rule, call = next(iter(asked.values()))
            raise TargetError(
                f"The rule for {rule.match!r} quantises {call.name!r}, and {target.name} keeps no cache: what it runs "
                "computes all keys and values anew. Drop the rule, or plan for llamacpp, vllm or pytorch."
            )
        return PlannedStates(used=found.used)
    formats = {name: StateChoice(call, str(rule.activation)) for name, (rule, call) in asked.items()}
    chosen = target.attention.chosen(formats, graph.states)
    for name, choice in chosen.items():
        by_rule = asked.get(name)
        found.sites.append(_site(choice, None if by_rule is None else by_rule[0]))
        found.plans.append(StatePlan(choice.call.scope, choice.call.kind, choice.rule))
    for call in graph.states:
        if call.name not in chosen:
            found.floats.setdefault(call.name, target.attention.why_float(call))
    return found


def _is_for(rule: Rule, call: Call, graph: Graph) -> bool:
    kinds = {*COMPUTING_KINDS, *JOINING_KINDS, "embedding"}
    layers = (calls[0] for calls in graph.by_name.values())
    return rule.matches(call.name, call.type, call.kind) and not any(
        rule.matches(each.name, each.type, each.kind) for each in layers if each.kind in kinds
    )


def _check(rule: Rule, call: Call, model: nn.Module) -> None:
    if rule.weight is not None:
        raise PlanError(f"The rule for {rule.match!r} matches {call.name!r}, which has no weight. Drop weight=.")
    if rule.activation is None:
        raise PlanError(
            f"The rule for {rule.match!r} matches {call.name!r} and names no format. Add one, such as "
            "activation='fp8_e4m3/tensor'."
        )
    module = model.get_submodule(call.scope)
    if quantizes_states(module):
        raise PlanError(f"{call.scope!r} has an attribute {ATTRIBUTE!r} of its own, where its quantisers would go.")


def _site(choice: StateChoice, rule: Rule | None) -> Site:
    call, fmt = choice.call, named_format(choice.format)
    reason = ": ".join(part for part in (rule and f"rule {rule.match!r}", choice.reason) if part)
    has_one_scale = isinstance(fmt.granularity, PerTensor | PerHead) and fmt.scale is not None
    if choice.rule is not None or not has_one_scale:
        if rule is not None and (rule.scale not in (None, "dynamic") or rule.estimator not in (None, "identity")):
            raise PlanError(
                f"{call.name!r}: {choice.format} takes its scales from each tensor as it comes. Leave scale= and "
                "estimator= out, or use a format with one scale for all tokens, such as int8/tensor or int8/head."
            )
        estimator, range = ("identity", "") if choice.rule else ("ste", (rule and rule.range) or "absmax")
        return Site(call.name, "state", choice.format, "dynamic", estimator, range, call.shape, reason)
    scale = (rule and rule.scale) or "learned"
    estimator = (rule and rule.estimator) or ("lsq" if scale == "learned" else "ste")
    range = (rule and rule.range) or "mse"
    return Site(call.name, "state", choice.format, scale, estimator, range, call.shape, reason)
