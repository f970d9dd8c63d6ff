"""Placement: from a graph, rules and a scheme to a plan.

A quantised layer absorbs the batch norm and the clamp that follow it, so that a chain is quantised once, at its end.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from isogrid.errors import FormatError, PlanError
from isogrid.formats import Format, named_format
from isogrid.layers.weights import weight_key, weight_of
from isogrid.planning.arguments import Arguments
from isogrid.planning.chains import Chain, fused_additions, nonnegative
from isogrid.planning.choice import NORM_WEIGHT, Choice, choose
from isogrid.planning.exchange import apart_for
from isogrid.planning.float_inputs import input_owners, input_sites
from isogrid.planning.functions import function_plans, is_runtime_function
from isogrid.planning.fused import fuse, fused_with, has_one_scale
from isogrid.planning.graph import COMPUTING_KINDS, JOINING_KINDS, LAYER_KINDS, Call, Graph
from isogrid.planning.grids import Grids, Owner
from isogrid.planning.halves import asks_for_half, half_plans
from isogrid.planning.mixtures import Assigned, assign
from isogrid.planning.neighbours import neighbours_at_work
from isogrid.planning.norms import as_convolutions, lone_norms
from isogrid.planning.plan import Feed, LayerPlan, OperationPlan, Plan, Site
from isogrid.planning.positions import from_positions
from isogrid.planning.roles import Weight
from isogrid.planning.routers import routers
from isogrid.planning.rules import Rule, Scheme, unmatched_rule_error
from isogrid.planning.states import PlannedStates, plan_states
from isogrid.planning.stubs import outside_stubs
from isogrid.planning.target import Target
from isogrid.planning.watching import watched_scopes


@dataclass
class Placement:
    """Builds a plan; `plan()` is the result.

    Attributes:
        model, graph, target, scheme, rules, arguments: what is given.
        strict: a format of the scheme that does not fit a weight is an error, also where another stands in for it.
        choices: what is quantised, by name.
        floats: what a rule or the target keeps in float, with the reason.
        halves: what computes in float16 instead, with the reason.
        functions: what the runtime computes in float by a rule of its own.
        states: queries and caches of attention.
    """

    model: nn.Module
    graph: Graph
    target: Target
    scheme: Scheme
    rules: Sequence[Rule]
    arguments: Arguments
    strict: bool = False
    choices: dict[str, Choice] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    halves: dict[str, str] = field(default_factory=dict)
    functions: list[Call] = field(default_factory=list)
    states: PlannedStates = field(default_factory=PlannedStates)
    _norms: set[str] = field(default_factory=set)

    def plan(self) -> Plan:
        """The plan.

        Raises:
            PlanError: a rule matches nothing or contradicts another; the model is not float32.
            TargetError: the target cannot run a format.
            FormatError: a format does not fit a weight.
        """
        self._choose()
        return self._static_plan() if self.scheme.arithmetic == "static" else self._weight_plan()

    def _choose(self) -> None:
        used: set[int | None] = set()
        refused: dict[int, str] = {}
        kinds = COMPUTING_KINDS | JOINING_KINDS | {"embedding"}
        self._decide((name for name, calls in self.graph.by_name.items() if calls[0].kind in kinds), used, refused)
        if self.scheme.arithmetic == "static":
            self._norms = lone_norms(self.graph, self.choices)
            self.graph = as_convolutions(self.graph, self._norms)
            self._decide((name for name in self.graph.by_name if name in self._norms), used, refused)
        if self.target.fused_layers:
            self.choices |= fuse(self.choices, self._fused, self._weight, self.target.name)
        self.states = plan_states(self.model, self.graph, self.rules, self.target)
        for index, rule in enumerate(self.rules):
            if index in used or index in self.states.used:
                continue
            if index in refused:
                raise PlanError(f"The rule for {rule.match!r} {refused[index]}.")
            raise unmatched_rule_error(rule, self.graph)

    def _decide(self, names: Iterable[str], used: set[int | None], refused: dict[int, str]) -> None:
        """Choose for each name by its rule, which counts as used or has its refusal noted, or by the scheme."""
        for name in names:
            calls = self.graph.calls_of(name)
            call = calls[0]
            index = next((i for i, r in enumerate(self.rules) if r.matches(name, call.type, call.kind)), None)
            rule = None if index is None else self.rules[index]
            if rule is not None and rule.keep == "float":
                self.floats[name] = f"rule {rule.match!r}"
            elif rule is None and self.scheme.only not in (None, call.type):
                self.floats[name] = f"scheme {self.scheme.name} is for {self.scheme.only} layers"
            elif self._can_be_half(calls) and asks_for_half(rule):
                self.halves[name] = f"rule {self.rules[index or 0].match!r}"
            elif why := self._why_float(calls):
                self._keep(name, why)
                if is_runtime_function(call, self.target.kernels):
                    self.functions.append(call)
                if index is not None:  # a pattern may quantise what else it matches
                    refused.setdefault(index, f"asks to quantise {name!r}, but {why}. Keep it float")
                    continue
            else:
                assigned = self._assigned.get(name, Assigned(self.scheme.weight))
                self.choices[name] = choose(name, rule, self.scheme, assigned, self.strict)
            used.add(index)

    def _keep(self, name: str, why: str) -> None:
        (self.halves if self._can_be_half(self.graph.calls_of(name)) else self.floats)[name] = why

    def _can_be_half(self, calls: Sequence[Call]) -> bool:
        call = calls[0]
        alike = all(other.kind == call.kind and len(other.inputs) == len(call.inputs) for other in calls)
        return call.type in self.scheme.halves and alike and call.name not in self._apart

    def _why_float(self, calls: Sequence[Call]) -> str | None:
        call = calls[0]
        if (why := self._apart.get(call.name)) is not None:
            return why
        if any(other.kind != call.kind or len(other.inputs) != len(call.inputs) for other in calls):
            return next((other.reason for other in calls if other.reason), "its calls are of different kinds")
        if self.scheme.keeps_heads and self.scheme.arithmetic != "static" and self._leaves_model(calls):
            return f"its output leaves the model, and {self.target.name} keeps heads in half precision"
        return self.target.supports(call, self.scheme)

    @cached_property
    def _fused(self) -> dict[str, tuple[str, ...]]:
        layers = [name for name, calls in self.graph.by_name.items() if calls[0].kind == "linear"]
        return fused_with(layers, self.target.fused_layers)

    @cached_property
    def _apart(self) -> dict[str, str]:
        """What stays float whatever the target, with the reason."""
        return {**routers(self.model, self.graph), **from_positions(self.graph), **outside_stubs(self.graph)}

    @cached_property
    def _assigned(self) -> dict[str, Assigned]:
        """What the scheme's mixture stores layers in, and what stands in where rows do not fit."""
        if self.scheme.mixture is None and not self.scheme.falls_back:
            return {}
        first: dict[Hashable, str] = {}
        weights = []
        for name, calls in self.graph.by_name.items():
            if calls[0].kind in LAYER_KINDS and self._why_float(calls) is None:
                module = self.model.get_submodule(name)
                owner = first.setdefault(weight_key(module), name)
                experts = int(getattr(module, "experts", 1)) if calls[0].kind == "experts" else 1
                weights.append(Weight(name, calls[0].kind, tuple(self._weight(name).shape), owner, experts))
        return assign(self.scheme.mixture, self.scheme.weight, weights)

    def _static_plan(self) -> Plan:
        self._choose_ends()
        # What every runtime has to compute alike must not depend on which kernels leave their output in float.
        is_portable = self.scheme.sums == "all"
        endings = frozenset() if is_portable else self.target.float_endings
        neighbours = neighbours_at_work(self.graph, self.choices, endings)
        fuses = self.target.fuses_additions and not is_portable
        fused = fused_additions(self.graph, neighbours.chains) if fuses else {}
        grids = Grids(neighbours.with_floats(fused.values()), self.scheme.sums, self.scheme.pools_keep_grid)
        layers: list[LayerPlan] = []
        operations: list[OperationPlan] = []
        for name in self.choices:
            call = self.graph.calls_of(name)[0]
            if call.kind == "embedding":
                layers.append(LayerPlan(name, self._weight_owner[name], arithmetic="weight_only"))
            elif name in grids.chains:
                chain = grids.chains[name]
                feeds, output = grids.feeds(name), grids.output_of(chain)
                clamp = chain.clamp.clamp if chain.clamp else None
                if call.kind in LAYER_KINDS:
                    norm = chain.batch_norm.name if chain.batch_norm else name if name in self._norms else None
                    layers.append(LayerPlan(name, self._weight_owner[name], feeds[0], output, norm, clamp))
                else:
                    kind = "fused_add" if name in fused else call.kind
                    operations.append(OperationPlan(call.scope, _site(call), kind, feeds, output, clamp))
            elif name in grids.joins:
                owner = grids.owner_of(call.output)
                operations.append(OperationPlan(call.scope, _site(call), call.kind, grids.feeds(name), owner))
        sites = self._weight_sites(layers) + self._activation_sites(grids, nonnegative(self.graph, grids.chains))
        return self._assembled(sites, layers, operations, grids.chains)

    def _weight_plan(self) -> Plan:
        layers = [self._float_layer(name, self.graph.calls_of(name)[0].kind) for name in self.choices]
        inputs = input_sites(self.graph, self.choices, self.scheme, self.target, self._inputs)
        return self._assembled(self._weight_sites(layers) + inputs, layers, function_plans(self.functions), {})

    def _float_layer(self, name: str, kind: str) -> LayerPlan:
        if name in self._inputs:
            feed = Feed(f"{self._inputs[name]}.input", on_grid=False)
            return LayerPlan(name, self._weight_owner[name], feed, arithmetic="float")
        if kind not in ("linear", "experts") or self.scheme.arithmetic == "weight_only":
            return LayerPlan(name, self._weight_owner[name], arithmetic="weight_only")
        rule = self.target.activation_rule(named_format(self.choices[name].weight), self.scheme)
        arithmetic = "weight_only" if rule is None else self.scheme.arithmetic
        return LayerPlan(name, self._weight_owner[name], arithmetic=arithmetic, activation_rule=rule)

    @cached_property
    def _inputs(self) -> dict[str, str]:
        return input_owners(self.graph, self.choices, self.scheme)

    @cached_property
    def _weight_owner(self) -> dict[str, str]:
        """The site of each layer's weight: that of the first layer which uses the same parameter."""
        first: dict[Hashable, str] = {}
        found = {}
        for name in self.choices:
            if self.graph.calls_of(name)[0].kind in LAYER_KINDS:
                key: Hashable = weight_key(self.model.get_submodule(name))
                if name in self._fused and has_one_scale(named_format(self.choices[name].weight)):
                    key = self._fused[name]
                found[name] = first.setdefault(key, f"{name}.weight")
        return found

    def _weight_sites(self, layers: Sequence[LayerPlan]) -> list[Site]:
        sites: dict[str, Site] = {}
        for layer in layers:
            choice = self.choices[layer.path]
            owner = layer.weight.removesuffix(".weight")
            asked, shared = (replace(self.choices[name], activation=None, reason="") for name in (layer.path, owner))
            if asked != shared:
                raise PlanError(
                    f"{layer.path!r} and {owner!r} share one weight but are asked to store it as {asked.weight} "
                    f"({asked.scale}, {asked.estimator}, {asked.range}) and as {shared.weight} "
                    f"({shared.scale}, {shared.estimator}, {shared.range}). Write one rule that matches both."
                )
            weight = self._weight(layer.path)
            if layer.path in self._norms:
                choice = NORM_WEIGHT
            fmt = named_format(choice.weight)
            self.target.check_format("weight", fmt, self.graph.calls_of(layer.path)[0], self.scheme)
            self._check_weight(fmt, weight, layer)
            # The weight itself is at hand in every step, so that a scale that moves simply follows it.
            scale = "dynamic" if choice.scale == "moving" else choice.scale
            how = (choice.weight, scale, choice.estimator, choice.range)
            site = Site(layer.weight, "weight", *how, tuple(weight.shape), choice.reason)
            sites.setdefault(layer.weight, site)
        return list(sites.values())

    def _choose_ends(self) -> None:
        """What the scheme says about heads, small products, and the first and the last layer."""
        layers = [name for name in self.choices if self.graph.calls_of(name)[0].kind in ("linear", "convolution")]
        for name in layers:
            if (why := self._why_scheme_keeps(name)) and self.choices[name].reason == f"scheme {self.scheme.name}":
                self._keep(name, why)
                del self.choices[name]
        layers = [name for name in layers if name in self.choices]
        if self.scheme.first_and_last is not None and layers:
            for name in {layers[0], layers[-1]}:
                if self.choices[name].weight == self.scheme.weight:
                    self.choices[name] = replace(self.choices[name], weight=self.scheme.first_and_last)

    def _why_scheme_keeps(self, name: str) -> str:
        calls = self.graph.calls_of(name)
        least, shape = self.scheme.least_product, tuple(self._weight(name).shape)
        if calls[0].kind == "linear" and min(shape) < least:
            return f"{shape[1]} inputs and {shape[0]} outputs: fewer than {least} are faster in half precision"
        if self.scheme.keeps_heads and self._leaves_model(calls):
            return f"its output leaves the model, and scheme {self.scheme.name} keeps heads float"
        return ""

    def _leaves_model(self, calls: Sequence[Call]) -> bool:
        # A model of transformers knows its head, whose output may be scaled or capped before it leaves.
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is not None and self.model.get_submodule(calls[0].scope) is head:
            return True
        return not {self.graph.origin(v)[0] for v in self.graph.model_outputs}.isdisjoint(c.output for c in calls)

    def _activation(self, owner: Owner, choice: Choice, nonnegative: Collection[str]) -> str:
        """The format of a grid: the scheme may have another for what is never negative, and for what comes in."""
        assert choice.activation is not None
        if choice.activation != self.scheme.activation:
            return choice.activation
        if owner.kind != "output":
            return self.scheme.inputs or choice.activation
        if self.scheme.nonnegative and all(member.name in nonnegative for member in owner.members):
            return self.scheme.nonnegative
        return choice.activation

    def _activation_sites(self, grids: Grids, nonnegative: Collection[str]) -> list[Site]:
        sites = []
        for name, owner in grids.owners.items():
            choice = self.choices[owner.call.name]
            self._check_agreement(owner.members)
            if choice.scale == "dynamic":
                raise PlanError(
                    f"The rule for {owner.call.name!r} asks for dynamic scales, but scheme {self.scheme.name} stores "
                    "one scale for each activation. Use scale='moving', or a dynamic scheme such as 'w8a8-dynamic'."
                )
            activation = self._activation(owner, choice, nonnegative)
            self.target.check_format("activation", named_format(activation), owner.call, self.scheme)
            others = sorted({member.name for member in owner.members} - {owner.call.name})
            reason = choice.reason + (f", shared with {', '.join(others)}" if others else "")
            how = (activation, choice.scale, choice.estimator, choice.range)
            sites.append(Site(name, owner.kind, *how, owner.shape, reason))
        return sites

    def _check_agreement(self, members: Sequence[Call]) -> None:
        asked = {replace(self.choices[member.name], weight="", reason="") for member in members}
        if len(asked) > 1:
            names = ", ".join(sorted({member.name for member in members}))
            wishes = ", ".join(sorted(f"{c.activation} ({c.scale}, {c.estimator}, {c.range})" for c in asked))
            raise PlanError(f"{names} share one grid but are asked for {wishes}. Write one rule that matches them all.")

    def _check_weight(self, fmt: Format, weight: Tensor, layer: LayerPlan) -> None:
        if layer.arithmetic == "static" and weight.dtype != torch.float32:
            raise PlanError(
                f"{layer.path!r} has weights in {str(weight.dtype).removeprefix('torch.')}, too coarse or too fine for "
                "integers that are computed in float32. Call model.float() first; train in lower precision by "
                "torch.autocast."
            )
        try:
            fmt.scale_shape(tuple(weight.shape))
        except FormatError as error:
            reason = str(error).rpartition("]: ")[2]
            raise FormatError(
                f"{fmt} does not fit layer {layer.path!r}: {reason}\n"
                "Use one that does, channel granularity, or exclude the layer with a rule:\n"
                f"    - match: {layer.path}\n      keep: float"
            ) from None

    def _assembled(
        self,
        sites: list[Site],
        layers: list[LayerPlan],
        operations: list[OperationPlan],
        chains: Mapping[str, Chain],
    ) -> Plan:
        halves = half_plans(self.halves, {path: tuple(self._weight(path).shape) for path in self.halves})
        sites, layers = [*sites, *halves[0], *self.states.sites], [*layers, *halves[1]]
        absorbed = {call.name for chain in chains.values() for call in (*chain.norms, *chain.clamps)}
        planned = {layer.path for layer in layers} | {f"{o.scope}.{o.site}".lstrip(".") for o in operations}
        lent = tuple(each for each in self.graph.lent if each.path in planned)
        return Plan(
            target=self.target.name,
            kernels=self.target.kernels,
            scheme=self.scheme.name,
            sites=tuple(sites),
            layers=tuple(layers),
            operations=tuple(operations),
            scopes=watched_scopes(
                self.graph, operations, chains, {each.scope for each in lent}, self.scheme.arithmetic == "static"
            ),
            floats=(*self._float_rows(planned | absorbed), *self.states.floats.items()),
            states=tuple(self.states.plans),
            arguments=self.arguments,
            lent=lent,
            apart=apart_for(self.model, planned),
        )

    def _float_rows(self, quantized: set[str]) -> tuple[tuple[str, str], ...]:
        rows: dict[str, str] = {}
        for name, calls in self.graph.by_name.items():
            # A function may move values in one call and compute in another, as interpolate does.
            call = next((call for call in calls if call.kind not in ("pass", "dropout")), None)
            if name not in quantized and call is not None:
                reason = self.floats.get(name) or call.reason or self._why_left(call)
                if reason:
                    rows[name] = reason
        for path in self.graph.uncalled:
            rows.setdefault(path, "not called on the example inputs")
        return tuple(rows.items())

    def _why_left(self, call: Call) -> str:
        if call.kind == "float":
            if "norm" in call.type.lower():
                return f"{call.type} computes its statistics in float; integer layers quantise what they read of it"
            if "softmax" in call.type:
                return f"{call.type} takes float scores: one step of 8 bits between them is percents of an exponential"
            return f"{call.type} has no integer arithmetic here"
        if self.scheme.arithmetic != "static":
            return "" if call.kind == "clamp" else f"scheme {self.scheme.name} quantises weights only"
        if call.kind == "activation":
            return f"{call.type} of what is float before or behind it anyway, which a table would only round"
        return f"{call.type} with no quantised neighbour to join"

    def _weight(self, path: str) -> Tensor:
        return weight_of(self.model.get_submodule(path))


def _site(call: Call) -> str:
    return call.name.rpartition(".")[2]
