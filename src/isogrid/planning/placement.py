"""Placement: from a graph, rules and a scheme to a plan.

A quantised layer absorbs the batch norm and the ReLU that follow it, so that a chain is quantised once, after its
activation. Grids belong to values: whatever reads a value finds the grid that its producer gave it, and values
that a runtime joins without arithmetic, the parts of a concatenation, share one grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from isogrid.errors import FormatError, PlanError
from isogrid.formats import Format, named_format
from isogrid.planning.graph import Call, Graph
from isogrid.planning.plan import Feed, InputSpec, LayerPlan, OperationPlan, Plan, Site
from isogrid.planning.rules import Rule, Scheme, unmatched_rules_error
from isogrid.planning.target import Target

COMPUTING_KINDS = frozenset({"linear", "convolution", "add", "average_pool"})
"""Calls that compute with quantised inputs in integer arithmetic."""


@dataclass(frozen=True)
class Choice:
    """What rules and scheme say about one layer or operation."""

    weight: str
    activation: str | None
    scale: str
    estimator: str
    range: str
    reason: str


@dataclass
class _Chain:
    """A computing call with what it absorbs, and the value that comes out at its end."""

    call: Call
    value: int
    batch_norm: Call | None = None
    activation: Call | None = None


@dataclass
class Placement:
    """Builds a plan step by step; `plan()` is the result."""

    model: nn.Module
    graph: Graph
    target: Target
    scheme: Scheme
    rules: Sequence[Rule]
    inputs: tuple[InputSpec, ...]
    choices: dict[str, Choice] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The plan; raises PlanError for rules that match nothing, TargetError for formats that cannot run."""
        self._choose()
        if self.scheme.arithmetic == "static":
            return self._static_plan()
        return self._weight_plan()

    def _choose(self) -> None:
        used: set[int] = set()
        candidates = [call for call in self.graph.calls if call.kind in COMPUTING_KINDS | {"concat", "embedding"}]
        for call in candidates:
            index = next((i for i, r in enumerate(self.rules) if r.matches(call.name, call.type, call.kind)), None)
            rule = None if index is None else self.rules[index]
            if index is not None:
                used.add(index)
            if call.name in self.choices or call.name in self.floats:
                continue
            if rule is not None and rule.keep == "float":
                self.floats[call.name] = f"rule {rule.match!r}"
            elif (why := self.target.supports(call, self.scheme)) is not None:
                self._refuse_rule(rule, call, why)
                self.floats[call.name] = why
            else:
                self.choices[call.name] = self._choice(rule)
        unused = [rule for i, rule in enumerate(self.rules) if i not in used]
        if unused:
            raise unmatched_rules_error(unused, dict.fromkeys(call.name for call in candidates))

    @staticmethod
    def _refuse_rule(rule: Rule | None, call: Call, why: str) -> None:
        if rule is not None:
            raise PlanError(f"The rule for {rule.match!r} asks to quantise {call.name!r}, but {why}. Keep it float.")

    def _choice(self, rule: Rule | None) -> Choice:
        asked: Any = rule if rule is not None else Rule(match="*", keep="float")
        scale = asked.scale or "learned"
        return Choice(
            weight=asked.weight or self.scheme.weight,
            activation=asked.activation or self.scheme.activation,
            scale=scale,
            estimator=asked.estimator or ("lsq" if scale == "learned" else "ste"),
            range=asked.range or "mse",
            reason=f"scheme {self.scheme.name}" if rule is None else f"rule {rule.match!r}",
        )

    def _static_plan(self) -> Plan:
        chains = self._chains()
        grids = _Grids(self.graph, chains, self.choices)
        layers: list[LayerPlan] = []
        operations: list[OperationPlan] = []
        for call in self.graph.calls:
            if call.name not in self.choices or any(call.name == plan.path for plan in layers):
                continue
            feeds = tuple(grids.feed(call, value) for value in call.inputs)
            if call.kind == "embedding":
                layers.append(LayerPlan(call.name, self._weight_owner(call.name), arithmetic="weight_only"))
            elif call.kind == "concat":
                if call.name in grids.concats:
                    site = call.name.rpartition(".")[2]
                    operations.append(OperationPlan(call.scope, site, "concat", feeds, grids.owner_of(call.output)))
            else:
                chain = chains[call.name]
                activation = "relu" if chain.activation else None
                output = grids.output_of(chain)
                if call.kind in ("linear", "convolution"):
                    norm = chain.batch_norm.name if chain.batch_norm else None
                    weight = self._weight_owner(call.name)
                    layers.append(LayerPlan(call.name, weight, feeds[0], output, norm, activation))
                else:
                    assert output is not None
                    site = call.name.rpartition(".")[2]
                    operations.append(OperationPlan(call.scope, site, call.kind, feeds, output, activation))
        sites = self._weight_sites(layers) + self._activation_sites(layers, operations, grids)
        return self._assembled(sites, layers, operations, chains)

    def _weight_plan(self) -> Plan:
        layers = [
            LayerPlan(
                name, self._weight_owner(name), arithmetic=self.scheme.arithmetic if kind == "linear" else "weight_only"
            )
            for name, kind in {call.name: call.kind for call in self.graph.calls if call.name in self.choices}.items()
        ]
        return self._assembled(self._weight_sites(layers), layers, [], {})

    def _chains(self) -> dict[str, _Chain]:
        """Each computing call with the batch norm and ReLU that only it feeds; layers used twice absorb nothing."""
        chains: dict[str, _Chain] = {}
        for call in self.graph.calls:
            if call.name not in self.choices or call.kind not in COMPUTING_KINDS or call.name in chains:
                continue
            chain = _Chain(call, call.output)
            if len(self.graph.calls_of(call.name)) == 1:
                follower = self.graph.only_consumer(chain.value)
                if follower is not None and self._can_absorb(call, follower):
                    chain.batch_norm, chain.value = follower, follower.output
                    follower = self.graph.only_consumer(chain.value)
                if follower is not None and follower.kind == "relu":
                    chain.activation, chain.value = follower, follower.output
            chains[call.name] = chain
        return chains

    def _can_absorb(self, call: Call, follower: Call) -> bool:
        if follower.kind != "batch_norm" or call.kind not in ("linear", "convolution"):
            return False
        module: Any = self.model.get_submodule(follower.name)
        channel_axis_is_last = call.kind == "linear" and len(call.shape) > 2
        once = len(self.graph.calls_of(follower.name)) == 1
        return module.running_mean is not None and once and not channel_axis_is_last

    def _weight_owner(self, path: str) -> str:
        """The site of a layer's weight: that of the first layer which uses the same parameter."""
        weight = self.model.get_submodule(path).weight
        first = next(
            call.name
            for call in self.graph.calls
            if call.name in self.choices
            and call.kind in ("linear", "convolution", "embedding")
            and self.model.get_submodule(call.name).weight is weight
        )
        return f"{first}.weight"

    def _weight_sites(self, layers: Sequence[LayerPlan]) -> list[Site]:
        sites: dict[str, Site] = {}
        for layer in layers:
            choice = self.choices[layer.path]
            owner = layer.weight.removesuffix(".weight")
            if self.choices[owner].weight != choice.weight:
                raise PlanError(
                    f"{layer.path!r} and {owner!r} share one weight but are asked to store it as {choice.weight} and "
                    f"{self.choices[owner].weight}. Give both the same format."
                )
            weight = self.model.get_submodule(layer.path).weight
            assert isinstance(weight, Tensor)
            call = self.graph.calls_of(layer.path)[0]
            fmt = named_format(choice.weight)
            self.target.check_format("weight", fmt, call, self.scheme)
            self._check_shape(fmt, weight, layer.path)
            made = Site(
                layer.weight, "weight", choice.weight, choice.scale, choice.estimator, choice.range,
                tuple(weight.shape), choice.reason,
            )  # fmt: skip
            sites.setdefault(layer.weight, made)
        return list(sites.values())

    def _activation_sites(
        self, layers: Sequence[LayerPlan], operations: Sequence[OperationPlan], grids: "_Grids"
    ) -> list[Site]:
        sites = []
        for name, (call, shape, members) in grids.owners().items():
            choice = self.choices[call.name]
            asked = {self.choices[m.name].activation for m in members}
            if len(asked) > 1:
                names = ", ".join(sorted({member.name for member in members}))
                raise PlanError(
                    f"{names} must share one grid but are asked for {', '.join(map(str, sorted(map(str, asked))))}."
                )
            assert choice.activation is not None
            self.target.check_format("activation", named_format(choice.activation), call, self.scheme)
            others = sorted({member.name for member in members} - {call.name})
            reason = choice.reason + (f", shared with {', '.join(others)}" if others else "")
            kind = name.rpartition(".")[2]
            sites.append(
                Site(name, kind, choice.activation, choice.scale, choice.estimator, choice.range, shape, reason)
            )
        return sites

    def _check_shape(self, fmt: Format, weight: Tensor, path: str) -> None:
        try:
            fmt.scale_shape(tuple(weight.shape))
        except FormatError as error:
            raise FormatError(
                f"{path!r}: {error} Use one of them, channel granularity, or exclude the layer with a rule:\n"
                f"    - match: {path}\n      keep: float"
            ) from None

    def _assembled(
        self, sites: list[Site], layers: list[LayerPlan], operations: list[OperationPlan], chains: dict[str, _Chain]
    ) -> Plan:
        scopes: dict[str, tuple[str, ...]] = {
            call.scope: ()
            for call in self.graph.calls
            if call.kind in ("add", "concat", "average_pool", "relu", "mean")
        }
        absorbed = {
            name
            for chain in chains.values()
            for part in (chain.batch_norm, chain.activation)
            if part
            for name in [part.name]
        }
        for chain in chains.values():
            if chain.activation is not None:
                scope = chain.activation.scope
                scopes[scope] = (*scopes[scope], chain.activation.name.rpartition(".")[2])
        planned = {layer.path for layer in layers} | {f"{o.scope}.{o.site}".lstrip(".") for o in operations}
        return Plan(
            target=self.target.name,
            scheme=self.scheme.name,
            sites=tuple(sites),
            layers=tuple(layers),
            operations=tuple(operations),
            scopes=scopes,
            floats=self._float_rows(planned | absorbed),
            inputs=self.inputs,
        )

    def _float_rows(self, quantized: set[str]) -> tuple[tuple[str, str], ...]:
        rows: dict[str, str] = {}
        for call in self.graph.calls:
            if call.name in quantized or call.kind in ("pass", "dropout"):
                continue
            if call.name in self.floats:
                rows.setdefault(call.name, self.floats[call.name])
            elif call.kind == "float":
                rows.setdefault(call.name, f"{call.type} has no integer arithmetic here")
            elif self.scheme.arithmetic != "static":
                if call.kind not in ("relu",):
                    rows.setdefault(call.name, f"scheme {self.scheme.name} quantises weights only")
            else:
                rows.setdefault(call.name, f"{call.type} with no quantised neighbour to join")
        for path in self.graph.uncalled:
            rows.setdefault(path, "not called on the example inputs")
        return tuple(rows.items())


class _Grids:
    """Which values lie on which grid; grids that must be one are merged."""

    def __init__(self, graph: Graph, chains: dict[str, _Chain], choices: dict[str, Choice]):
        self.graph, self.chains = graph, chains
        self._parent: dict[int, int] = {}
        self._output_values = {
            call_output: chain
            for chain in chains.values()
            for call in graph.calls_of(chain.call.name)
            for call_output in ([chain.value] if call is chain.call else [call.output])
        }
        self.concats = {
            c.name for c in graph.calls if c.kind == "concat" and c.name in choices and self._is_read(c.output)
        }
        for call in graph.calls:
            if call.name in self.concats:
                for value in call.inputs:
                    self._merge(self._origin(value), call.output)
        for chain in chains.values():
            calls = graph.calls_of(chain.call.name)
            for other in calls[1:]:
                for mine, its in zip(calls[0].inputs, other.inputs, strict=True):
                    self._merge(self._origin(mine), self._origin(its))
                self._merge(chain.value, other.output)

    def feed(self, call: Call, value: int) -> Feed:
        """Where an input of a call gets its grid."""
        origin, exact = self.graph.origin(value)
        return Feed(
            self.owner_of(value) if self._root(origin) in self._named() else "", exact and self._is_produced(origin)
        )

    def owner_of(self, value: int) -> str:
        """The site that owns the grid of a value."""
        return self._named()[self._root(self._origin(value))]

    def output_of(self, chain: _Chain) -> str | None:
        """The site that owns the grid of a chain's output; None where nothing integer reads a Linear's output."""
        needed = chain.call.kind != "linear" or any(
            self._is_read(v) for v, owner in self._output_values.items() if owner is chain
        )
        return self._named()[self._root(chain.value)] if needed else None

    def owners(self) -> dict[str, tuple[Call, tuple[int, ...], list[Call]]]:
        """For each grid's owning site: the call that owns it, the value's shape, all calls whose values share it."""
        found: dict[str, tuple[Call, tuple[int, ...], list[Call]]] = {}
        for call, kind, value, root in self._uses():
            name = self._named()[root]
            if name not in found:
                found[name] = (call, self._shape(value), [])
            if kind == "output":
                found[name][2].append(call)
        return found

    def _named(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for call, kind, _, root in self._uses():
            names.setdefault(root, f"{call.name}.{kind}")
        return names

    def _uses(self) -> list[tuple[Call, str, int, int]]:
        """Every quantised output, then every input that nobody quantises before, in order: call, kind, value, grid."""
        outputs, inputs = [], []
        for call in self.graph.calls:
            if call.name in self.concats or call.name in self.chains:
                for number, value in enumerate(call.inputs):
                    origin = self._origin(value)
                    if not self._is_produced(origin):
                        kind = "input" if len(call.inputs) == 1 else f"input{number}"
                        inputs.append((call, kind, value, self._root(origin)))
            if call.name in self.chains:
                chain = self.chains[call.name]
                value = chain.value if call is chain.call else call.output
                if self._is_produced(value):
                    outputs.append((call, "output", value, self._root(value)))
        return outputs + inputs

    def _is_produced(self, value: int) -> bool:
        """Whether a value leaves its producer quantised."""
        producer = self.graph.producer.get(value)
        if producer is not None and producer.name in self.concats:
            return True
        chain = self._output_values.get(value)
        return chain is not None and (chain.call.kind != "linear" or self._is_read(value))

    def _is_read(self, value: int) -> bool:
        """Whether integer arithmetic reads a value."""
        for call in self.graph.readers(value):
            if call.name in self.chains:
                return True
            if call.kind == "concat" and self._is_read(call.output):
                return True
        return False

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
