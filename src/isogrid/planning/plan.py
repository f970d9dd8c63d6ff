"""The plan: the outcome of rules and scheme for every site, with the reason, and all that stays float."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from isogrid.errors import PlanError
from isogrid.layers.clamp import Clamp
from isogrid.layers.lent import Lent, Product
from isogrid.planning.arguments import Arguments, InputSpec


@dataclass(frozen=True)
class Site:
    """A place in a model that is quantised.

    Attributes:
        name: `conv1.weight`, `conv1.input`, `layer1.0.add.output`.
        kind: weight, input, output, or state: the queries of an attention layer, or the keys or values that it caches.
        format: name of the format.
        scale, estimator, range: how it trains; see `isogrid.Rule`.
        shape: of the weight; of one example for activations, batch included.
        reason: which rule or scheme decided, or whose grid it shares.
    """

    name: str
    kind: str
    format: str
    scale: str
    estimator: str
    range: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Feed:
    """Where an input of a layer or operation gets its grid.

    Attributes:
        grid: the site that owns the grid.
        on_grid: whether the value arrives already quantised.
    """

    grid: str
    on_grid: bool


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one module with a weight.

    Attributes:
        path: of the module.
        weight: the site of its weight; layers that share a parameter share the site.
        input: where its input gets its grid, or None for float inputs.
        output: the site that owns the grid of its output, or None for float outputs.
        batch_norm: path of the batch norm it absorbs; a batch norm that is a layer of its own absorbs itself.
        clamp: the ReLU, or other limit to its output, that it applies in place of the call that follows.
        arithmetic: static, weight_only, dynamic, float where it computes in float on a quantised input, or half where
            input, weight, bias and output are float16.
        activation_rule: what the runtime does to its input as it comes, a key of
            `isogrid.layers.dynamic.ACTIVATION_RULES`, or None.
    """

    path: str
    weight: str
    input: Feed | None = None
    output: str | None = None
    batch_norm: str | None = None
    clamp: Clamp | None = None
    arithmetic: str = "static"
    activation_rule: str | None = None


@dataclass(frozen=True)
class OperationPlan:
    """What becomes of one operation in a module's forward.

    Attributes:
        scope: path of the module.
        site: name of the call within its forward.
        kind: add, multiply, matmul, concat, average_pool, activation, fused_add for an addition inside the layer
            before it, or function for one of float values that the runtime has in a form of its own.
        inputs, output, clamp: as for a layer.
    """

    scope: str
    site: str
    kind: str
    inputs: tuple[Feed | None, ...]
    output: str | None
    clamp: Clamp | None = None


@dataclass(frozen=True)
class StatePlan:
    """What becomes of the queries of an attention layer, or of the keys or values that it caches.

    Attributes:
        path: of the layer.
        kind: query_states, key_cache or value_cache; the site is `path.kind`.
        rule: what the runtime does to them as they come, a key of `isogrid.layers.dynamic.ACTIVATION_RULES`; None where
            the site's format says all.
    """

    path: str
    kind: str
    rule: str | None = None

    @property
    def site(self) -> str:
        """The name of the site."""
        return f"{self.path}.{self.kind}".lstrip(".")


@dataclass(frozen=True)
class Plan:
    """Every site of a model with its format and the reason, and all that stays float.

    Attributes:
        target, scheme: names.
        kernels: how the target computes what runtimes do not agree on, a key of `isogrid.layers.kernels.KERNELS`.
        sites: weights and the activations that own a grid.
        layers, operations: what `prepare` does.
        scopes: paths of modules whose forward is watched, with the calls that other layers do for them.
        floats: name and reason of what stays float.
        arguments: of the model's forward.
        lent: products by parameters of a forward's own module, which children of it compute.
        apart: paths of modules of several products, such as nn.LSTM, that are taken apart into layers.
        states: queries, and cached keys and values, of attention layers.
    """

    target: str
    kernels: str
    scheme: str
    sites: tuple[Site, ...]
    layers: tuple[LayerPlan, ...]
    operations: tuple[OperationPlan, ...]
    scopes: dict[str, tuple[str, ...]]
    floats: tuple[tuple[str, str], ...]
    arguments: Arguments = field(default_factory=Arguments)
    apart: tuple[str, ...] = field(default=())
    lent: tuple[Lent, ...] = field(default=())
    states: tuple[StatePlan, ...] = field(default=())

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The tensors among the arguments, in the order in which an artefact takes them."""
        return self.arguments.tensors

    def site(self, name: str) -> Site:
        """A site by name."""
        for site in self.sites:
            if site.name == name:
                return site
        raise PlanError(f"The plan has no site {name!r}.")

    def tables(self) -> tuple[Table, Table]:
        """The sites, and what stays float, as Rich tables.

        What runtimes do to activations, and what stays float, is one row where names differ in their numbers only.
        """
        sites = Table(title=f"Plan: {self.scheme} for {self.target}", title_justify="left")
        for column in ("site", "format", "scale", "estimator", "range", "reason"):
            sites.add_column(column, overflow="fold")
        for site in self.sites:
            sites.add_row(site.name, site.format, site.scale, site.estimator, site.range, site.reason)
        rules = [(f"{each.path}.input", each.activation_rule) for each in self.layers if each.activation_rule]
        for name, rule in _alike(rules):
            reason = f"{self.target} quantises what arrives, by the weight's format"
            sites.add_row(name, rule, "dynamic", "identity", "", reason)
        functions = [(f"{each.scope}.{each.site}", "float") for each in self.operations if each.kind == "function"]
        for name, kind in _alike(functions):
            sites.add_row(name, kind, "", "identity", "", f"{self.target} has a form of its own, which is trained")
        floats = Table(title="Stays float", title_justify="left")
        floats.add_column("what")
        floats.add_column("why", overflow="fold")
        for name, reason in _alike(self.floats) or [("nothing", "")]:
            floats.add_row(name, reason)
        return sites, floats

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as capture:
            console.print(*self.tables())
        return capture.get().rstrip()

    def to_json(self) -> str:
        """The plan as JSON text, which `from_json` reads back to an equal plan."""
        return json.dumps({**asdict(self), "arguments": self.arguments.to_json()}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """A plan from its JSON text; raises PlanError where the text is none."""
        try:
            data: dict[str, Any] = json.loads(text)
            return Plan(
                target=data["target"],
                kernels=data["kernels"],
                scheme=data["scheme"],
                sites=tuple(Site(**{**site, "shape": tuple(site["shape"])}) for site in data["sites"]),
                layers=tuple(
                    LayerPlan(**{**layer, "input": _feed(layer["input"]), "clamp": _clamp(layer["clamp"])})
                    for layer in data["layers"]
                ),
                operations=tuple(
                    OperationPlan(
                        **{**o, "inputs": tuple(_feed(feed) for feed in o["inputs"]), "clamp": _clamp(o["clamp"])}
                    )
                    for o in data["operations"]
                ),
                apart=tuple(data["apart"]),
                lent=tuple(Lent(each["scope"], each["name"], _product(each["product"])) for each in data["lent"]),
                scopes={path: tuple(skipped) for path, skipped in data["scopes"].items()},
                states=tuple(StatePlan(**each) for each in data["states"]),
                floats=tuple((name, reason) for name, reason in data["floats"]),
                arguments=Arguments.from_json(data["arguments"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(
                f"This is not the JSON of a plan: {type(error).__name__}: {error}. Was it written by another "
                "version of Isogrid? Then plan anew."
            ) from error


def _alike(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """One row for all whose names differ in numbers only: `layers.*.mul (32)`, in the order of the first of each.

    >>> _alike([("layers.0.add", "why"), ("head", "why"), ("layers.1.add", "why"), ("layers.2.add", "another")])
    [('layers.*.add (2)', 'why'), ('head', 'why'), ('layers.2.add', 'another')]
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, text in rows:
        found.setdefault((re.sub(r"\d+", "*", name), text), []).append(name)
    return [
        (names[0] if len(names) == 1 else f"{pattern} ({len(names)})", text) for (pattern, text), names in found.items()
    ]


def _feed(data: dict[str, Any] | None) -> Feed | None:
    return None if data is None else Feed(**data)


def _product(data: dict[str, Any]) -> Product:
    arguments: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in data.items()}
    return Product(**arguments)


def _clamp(data: dict[str, Any] | None) -> Clamp | None:
    return None if data is None else Clamp(**data)
