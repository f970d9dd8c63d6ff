"""Prepare: turn a float model into one that trains on its plan's grids, in place."""

from typing import Any

import torch
from torch import nn

from isogrid.errors import NonFiniteError, PlanError
from isogrid.formats import IntegerGrid, named_format
from isogrid.layers.activation_sites import QuantizedActivation
from isogrid.layers.attention_states import RuleQuantizer, attach, cache_position, quantizes_states
from isogrid.layers.batch_norm import AbsorbedBatchNorm1d, AbsorbedBatchNorm2d, AbsorbedBatchNorm3d
from isogrid.layers.borrowed import BorrowedLinear, QuantizedBorrowedLinear
from isogrid.layers.convolution import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from isogrid.layers.dynamic import activation_rule
from isogrid.layers.elementwise import QuantizedAdd, QuantizedFusedAdd, QuantizedMultiply
from isogrid.layers.embedding import QuantizedEmbedding, QuantizedEmbeddingBag, QuantizedTable
from isogrid.layers.experts import BorrowedExperts, QuantizedExperts
from isogrid.layers.function_sites import RuntimeFunction
from isogrid.layers.intercept import own_class, parent_of
from isogrid.layers.kernels import KERNELS
from isogrid.layers.layer import Arithmetic, QuantizedLayer, link, replacement
from isogrid.layers.lent import (
    BorrowedConv1d,
    BorrowedConv2d,
    BorrowedConv3d,
    QuantizedBorrowedConv1d,
    QuantizedBorrowedConv2d,
    QuantizedBorrowedConv3d,
)
from isogrid.layers.linear import QuantizedLinear
from isogrid.layers.matmul import QuantizedMatmul
from isogrid.layers.norm import QuantizedBatchNorm1d, QuantizedBatchNorm2d, QuantizedBatchNorm3d
from isogrid.layers.own_forward import extended
from isogrid.layers.own_table import extended_table, is_own_table
from isogrid.layers.scope import (
    OperationScope,
    check_house,
    check_scope,
    host_of,
    house_sites,
    is_container,
    open_scope,
)
from isogrid.layers.sites import QuantizedAveragePool, QuantizedConcat, QuantizedSite
from isogrid.layers.weights import refresh_weights, weight_of
from isogrid.layers.where import QuantizedWhere
from isogrid.planning.classify import kind_of, layer_type
from isogrid.planning.exchange import exchange, take_apart
from isogrid.planning.functions import KIND as FUNCTION
from isogrid.planning.lending import lend, take_back
from isogrid.planning.plan import LayerPlan, OperationPlan, Plan, Site
from isogrid.planning.site_weights import weight_at
from isogrid.planning.state import add_state, is_prepared
from isogrid.quantizers import Quantizer
from isogrid.quantizers.estimators import estimator_from_name
from isogrid.quantizers.ranges import range_from_name

ARITHMETIC: dict[str, Arithmetic] = {
    "static": "static",
    "half": "half",
    **dict.fromkeys(("weight_only", "dynamic", "float"), "float"),
}
"""What layers do, by what plans say."""

LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    BorrowedLinear: QuantizedBorrowedLinear,
    BorrowedExperts: QuantizedExperts,
    BorrowedConv1d: QuantizedBorrowedConv1d,
    BorrowedConv2d: QuantizedBorrowedConv2d,
    BorrowedConv3d: QuantizedBorrowedConv3d,
    nn.Embedding: QuantizedEmbedding,
    nn.EmbeddingBag: QuantizedEmbeddingBag,
    nn.BatchNorm1d: AbsorbedBatchNorm1d,
    nn.BatchNorm2d: AbsorbedBatchNorm2d,
    nn.BatchNorm3d: AbsorbedBatchNorm3d,
}

LONE_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: QuantizedBatchNorm1d,
    nn.BatchNorm2d: QuantizedBatchNorm2d,
    nn.BatchNorm3d: QuantizedBatchNorm3d,
}
"""Batch norms that absorb themselves."""

OPERATIONS: dict[str, type[QuantizedSite]] = {
    "activation": QuantizedActivation,
    "add": QuantizedAdd,
    "fused_add": QuantizedFusedAdd,
    FUNCTION: RuntimeFunction,
    "multiply": QuantizedMultiply,
    "matmul": QuantizedMatmul,
    "average_pool": QuantizedAveragePool,
    "concat": QuantizedConcat,
    "where": QuantizedWhere,
}


def prepare(model: nn.Module, plan: Plan) -> nn.Module:
    """`isogrid.prepare` for any module, whatever library it is of; see there."""
    if is_prepared(model):
        raise PlanError("The model is prepared already. Start from a float model, or change the plan before prepare.")
    whole = take_apart(model, plan.apart)
    try:
        lend(model, plan.lent)
        builder = _Builder(model, plan)
        builder.check()
    except BaseException:
        take_back(model, plan.lent)
        exchange(model, whole)
        raise
    builder.build()
    add_state(model, plan)
    return model


def prepare_part(module: nn.Module, plan: Plan, *, has_values: bool = True) -> nn.Module:
    """Prepare a module by the part of a plan that is its own, in place; it gets no state of a prepared model.

    Args:
        module: a part of a float model.
        plan: of `plan_of_part`.
        has_values: False for a module on the meta device: its weights' quantizers are then without a range, which a
            checkpoint brings.
    """
    take_apart(module, plan.apart)
    lend(module, plan.lent)
    builder = _Builder(module, plan, has_values)
    builder.check()
    builder.build()
    return module


class _Builder:
    """Replaces modules and hands out quantizers, each owned by one module."""

    def __init__(self, model: nn.Module, plan: Plan, has_values: bool = True):
        self.model, self.plan, self.has_values = model, plan, has_values
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.quantizers: dict[str, Quantizer] = {}
        self.owned: set[Quantizer] = set()

    def check(self) -> None:
        """Refuse what does not fit, and make all quantizers, before anything is changed."""
        refresh_weights(self.model)
        busy = {operation.scope for operation in self.plan.operations}
        for path in {*self.plan.scopes, *busy}:
            has_sites = path in busy and not is_container(self._module(path))
            check_scope(self._module(path), has_sites)
            if path in busy and not has_sites:
                self._check_house(path)
        for layer in self.plan.layers:
            self._check_layer(layer)
        for path in {state.path for state in self.plan.states}:
            module = self._module(path)
            if cache_position(module) is None or quantizes_states(module):
                raise PlanError(f"The plan quantises the cache of {path!r}, which keeps none. Plan this model anew.")
        rules = {state.site: state.rule for state in self.plan.states}
        for site in self.plan.sites:
            rule = rules.get(site.name)
            ruled = None if rule is None else RuleQuantizer(activation_rule(rule))
            quantizer = self.quantizers[site.name] = ruled or make_quantizer(site)
            if site.kind == "weight" and self.has_values:
                weight = weight_at(self.model, self.plan, site.name)
                quantizer.to(weight.device).fit(weight)
            else:
                quantizer.to(self.device)

    def _check_house(self, path: str) -> None:
        host, relative = self._house(path)
        check_house(self._module(host), relative, [each.site for each in self.plan.operations if each.scope == host])

    def _house(self, path: str) -> tuple[str, str]:
        """The module that keeps the sites of a container, and the container's path from there."""
        host = host_of(self.model, path)
        if host is None:
            raise PlanError(f"The plan has operations of {path!r}, where nothing can be kept. Plan this model anew.")
        return host, path.removeprefix(f"{host}.")

    def _check_layer(self, layer: LayerPlan) -> None:
        module = self._module(layer.path)
        if layer.path == "":
            raise PlanError("A model that is itself one layer cannot be changed in place. Wrap it in nn.Sequential.")
        kind = "own forward" if own_class(module) is not None or is_own_table(module) else kind_of(module)
        if kind == "float" or (kind == "batch_norm" and layer.batch_norm != layer.path):
            raise PlanError(
                f"The plan quantises {layer.path!r}, which is a {type(module).__name__}. Plan this model anew."
            )
        if layer.batch_norm is not None and not isinstance(
            self._module(layer.batch_norm), nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
        ):
            raise PlanError(f"The plan folds {layer.batch_norm!r}, which is no batch norm. Plan this model anew.")
        weight = weight_of(module)
        if not self.has_values:
            return
        if weight.is_meta:
            raise PlanError(
                f"The weight of {layer.path!r} is on the meta device, where it has no values. Plan there if you like; "
                "then call model.to_empty(device='cpu'), load a checkpoint, and prepare."
            )
        if not weight.isfinite().all():
            raise NonFiniteError(
                f"The weight of {layer.path!r} holds NaN or infinity. Quantisation needs finite weights; "
                "look for the step of training that made them."
            )
        known = self.plan.site(layer.weight).shape
        if tuple(weight.shape) != known and layer.weight == f"{layer.path}.weight":
            raise PlanError(
                f"The plan knows {layer.path!r} with a weight of shape {list(known)}, not {list(weight.shape)}. "
                "Plan this model anew."
            )

    def build(self) -> None:
        """Change the model."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        made: dict[nn.Module, nn.Module] = {}
        for layer in self.plan.layers:
            self._replace(layer.path, modules, made, LONE_NORMS if layer.batch_norm == layer.path else LAYERS)
            if layer.batch_norm is not None:
                self._replace(layer.batch_norm, modules, made, LAYERS)
        exchange(self.model, made)
        sites = self._sites()
        for layer in self.plan.layers:
            self._configure(layer)
        told: set[tuple[str, ...]] = set()
        scopes: dict[str, OperationScope] = {}
        for path, skipped in self.plan.scopes.items():
            products = {lent.product: lent.name for lent in self.plan.lent if lent.scope == path}
            floats = [name.rpartition(".")[2] for name, _ in self.plan.floats if name.rpartition(".")[0] == path]
            scopes[path] = OperationScope(sites.get(path, {}), skipped, products, floats, told)
            open_scope(self._module(path), scopes[path])
        for path, scope in scopes.items():
            if len(scope.sites) and is_container(self._module(path)):
                host, relative = self._house(path)
                house_sites(self._module(host), relative, scope)

        self._attach_states()

    def _attach_states(self) -> None:
        found: dict[str, dict[str, Quantizer]] = {}
        for state in self.plan.states:
            found.setdefault(state.path, {})[state.kind] = self.quantizers[state.site]
        for path, kinds in found.items():
            attach(self._module(path), kinds)

    @staticmethod
    def _replace(
        path: str,
        modules: dict[str, nn.Module],
        made: dict[nn.Module, nn.Module],
        table: dict[type[nn.Module], type[nn.Module]],
    ) -> None:
        old = modules[path]
        if old not in made:
            made[old] = replacement(old, _layer_class(old, table))

    def _configure(self, plan: LayerPlan) -> None:
        module: Any = self._module(plan.path)
        self._give(module, plan.path, "weight_quantizer", plan.weight)
        kernels = KERNELS[self.plan.kernels]
        if isinstance(module, QuantizedTable):
            is_static = any(layer.arithmetic == "static" for layer in self.plan.layers)
            module.keeps_format = not kernels.packs_nbits and not is_static
            return
        assert isinstance(module, QuantizedLayer)
        module.arithmetic = ARITHMETIC[plan.arithmetic]
        module.clamp = plan.clamp
        module.input_on_grid = plan.input.on_grid if plan.input is not None else False
        module.input_rule = None if plan.activation_rule is None else activation_rule(plan.activation_rule)
        module.packs_nbits = kernels.packs_nbits and isinstance(module.weight_quantizer.format.grid, IntegerGrid)
        self._give(module, plan.path, "input_quantizer", plan.input.grid if plan.input is not None else None)
        self._give(module, plan.path, "output_quantizer", plan.output)
        norm: Any = self._module(plan.batch_norm) if plan.batch_norm is not None else None
        link(module, "batch_norm", norm)

    def _sites(self) -> dict[str, dict[str, nn.Module]]:
        found: dict[str, dict[str, nn.Module]] = {}
        for plan in self.plan.operations:
            found.setdefault(plan.scope, {})[plan.site] = self._site(plan)
        return found

    def _site(self, plan: OperationPlan) -> QuantizedSite:
        name = f"{plan.scope}.{plan.site}".lstrip(".")
        on_grid = [feed is not None and feed.on_grid for feed in plan.inputs]
        site = OPERATIONS[plan.kind](on_grid, plan.clamp, self.plan.kernels)
        for number, feed in enumerate(plan.inputs):
            self._give(site, name, f"input_quantizer{number}", None if feed is None else feed.grid)
        self._give(site, name, "output_quantizer", plan.output)
        return site

    def _give(self, module: nn.Module, name: str, attribute: str, site: str | None) -> None:
        """A quantizer as an attribute: owned by the layer or operation its site is named after, a link elsewhere."""
        quantizer = None if site is None else self.quantizers[site]
        owner = None if site is None else site.rpartition(".")[0]
        if quantizer is not None and owner == name and quantizer not in self.owned:
            self.owned.add(quantizer)
            module.add_module(attribute, quantizer.train(module.training))
        else:
            link(module, attribute, quantizer)

    def _module(self, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise PlanError(f"The plan names {path!r}, which this model does not have. Plan this model anew.") from None


def _layer_class(module: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> type[nn.Module]:
    if is_own_table(module):
        return extended_table(type(module))
    kind = layer_type(module) or parent_of(module)
    assert kind is not None
    own = own_class(module)
    return table[kind] if own is None else extended(table[kind], own)


def make_quantizer(site: Site) -> Quantizer:
    """The quantizer of a site, without a range yet."""
    of_weight = site.kind == "weight"
    rule: Any = site.scale
    return Quantizer(
        named_format(site.format),
        (1,) if site.kind in ("input", "output") else site.shape,
        range_from_name(site.range),
        estimator_from_name(site.estimator),
        rule,
        observes=not of_weight,
    )
