"""Low-rank adapters for prepared models: fine-tuning by a small part of the numbers, in the form that merges exactly.

L4Q (Jeon et al., arXiv 2402.04902) trains `Q(W + s·BA)`: the sum is what the quantizer sees, so that quantising the
merged weight gives the codes that were trained. `Q(W) + s·BA`, which QLoRA trains, is no number of the grid.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import nn

from isogrid.errors import PlanError
from isogrid.layers.adapters import ATTRIBUTE, Adapter, Adapters, AdapterSpec, adapters_of
from isogrid.layers.embedding import QuantizedTable
from isogrid.layers.layer import QuantizedLayer, link
from isogrid.layers.norm import QuantizedBatchNorm
from isogrid.layers.weights import base_of, computes_weight, weight_key, weight_of
from isogrid.planning.rules import nearest
from isogrid.planning.state import STATE_NAME, prepared_state, quantizers


@dataclass(frozen=True)
class AdapterReport:
    """What trains in a model with adapters, and what becomes of it when they are merged; prints as one line.

    Attributes:
        adapters: of the model.
        trainable, scales: numbers that train in all, and those among them that belong to quantizers.
        total: numbers of the model, without adapters.
        merges_exactly: whether the merged model computes what was trained, bit for bit.
        statement: that, in words.
    """

    adapters: tuple[AdapterSpec, ...]
    trainable: int
    scales: int
    total: int
    merges_exactly: bool
    statement: str

    def __str__(self) -> str:
        active = [spec for spec in self.adapters if spec.active]
        names = ", ".join(f"{spec.name} (rank {spec.rank}, {len(spec.layers)} layers)" for spec in active) or "none"
        share = f"{self.trainable:,} numbers train beside {self.total:,}"
        return f"Adapters: {names}; {share}, {self.scales:,} of them in quantizers. {self.statement}"


def add_adapters(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    match: str | Sequence[str] | None = None,
    *,
    exclude: str | Sequence[str] = (),
    name: str = "default",
    dora: bool = False,
    rank_stabilized: bool = False,
) -> AdapterReport:
    """Give layers of a prepared model low-rank updates `alpha / rank · BA`, and freeze everything else but scales.

    The updates are added to the weights before these are quantised (L4Q, arXiv 2402.04902): `convert`, `export` and
    `verify` see the merged weight, so that what is served is what was trained, bit for bit. The sum is never kept: the
    memory of a step is that of LoRA. Learned scales of the quantizers go on training.

    Args:
        model: prepared.
        rank: of the updates.
        alpha: their weight; rank, if not given.
        match: names of layers, wildcards allowed; a convolution [out, in, ...] is taken as a matrix [out, all others],
            the experts of a mixture share one A, and layers that share a weight share the update. If not given, all
            quantised layers but tables and those that share the weight of one.
        exclude: names of layers that are left out.
        name: of this adapter. It becomes the active one; others stay, and `use_adapters` brings them back.
        dora: the norms of the weight's rows train on their own: DoRA (arXiv 2402.09353).
        rank_stabilized: multiply by `alpha / √rank`: rsLoRA (arXiv 2312.03732).

    Returns:
        How much trains, and that it merges exactly.

    Raises:
        PlanError: the model is not prepared, no layer matches, the name is taken, or the rank is not below both
            dimensions of a layer's weight.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    >>> plan = ig.plan(model, scheme="q4_0", example_inputs=(torch.zeros(1, 64),))
    >>> report = add_adapters(ig.prepare(model, plan), rank=4, alpha=8)
    >>> report.trainable, report.merges_exactly
    (896, True)
    """
    state = prepared_state(model)
    if name in {spec.name for spec in state.adapters} or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise PlanError(f"{name!r} is no name for a new adapter: it is taken, empty, or holds a dot. Give another.")
    chosen = layers_to_adapt(model, match, exclude)
    _check_rank(model, chosen, rank)
    spec = AdapterSpec(
        name, rank, float(rank if alpha is None else alpha), tuple(chosen), dora=dora, rank_stabilized=rank_stabilized
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for quantizer in quantizers(model).values():
        quantizer.requires_grad_(True)
    attach(model, spec)
    return use_adapters(model, name)


def layers_to_adapt(
    model: nn.Module, match: str | Sequence[str] | None = None, exclude: str | Sequence[str] = ()
) -> list[str]:
    """Paths of the quantised layers that match, one for each weight.

    Raises:
        PlanError: a pattern matches nothing.
    """
    layers = _adaptable(model)
    tables = {weight_key(layer) for layer in layers.values() if isinstance(layer, QuantizedTable)}
    if match is None:
        found = [path for path, layer in layers.items() if weight_key(layer) not in tables]
    else:
        patterns = [match] if isinstance(match, str) else list(match)
        found = [path for path in layers if any(fnmatchcase(path, pattern) for pattern in patterns)]
        _check_patterns(patterns, layers)
    left_out = [exclude] if isinstance(exclude, str) else list(exclude)
    _check_patterns(left_out, layers)
    found = [path for path in found if not any(fnmatchcase(path, pattern) for pattern in left_out)]
    if not found:
        raise PlanError("No quantised layer is left to adapt. Give names of layers: isogrid.add_adapters(match=...).")
    first: dict[Hashable, str] = {}
    for path in found:
        first.setdefault(weight_key(layers[path]), path)
    return list(first.values())


def attach(model: nn.Module, spec: AdapterSpec) -> None:
    """Create an adapter's parameters in its layers, and in those that share a weight with one."""
    layers = _adaptable(model)
    missing = next((path for path in spec.layers if path not in layers), None)
    if missing is not None:
        raise PlanError(f"The adapter {spec.name!r} is of another model: there is no quantised layer {missing!r}.")
    sharing: dict[Hashable, list[nn.Module]] = {}
    for layer in layers.values():
        sharing.setdefault(weight_key(layer), []).append(layer)
    for path in spec.layers:
        layer = layers[path]
        adapters = adapters_of(layer)
        if adapters is None:
            adapters = Adapters()
            for other in sharing[weight_key(layer)]:
                if other is not layer:
                    link(other, ATTRIBUTE, adapters)
            layer.add_module(ATTRIBUTE, adapters)
        adapters[spec.name] = Adapter(base_of(layer).detach(), spec.rank, spec.scaling, spec.dora)
        adapters.train(layer.training)
    _set_specs(model, (*prepared_state(model).adapters, spec))


def use_adapters(model: nn.Module, *names: str) -> AdapterReport:
    """Add these adapters to the weights, summed up, and train them; all others rest.

    Args:
        model: prepared, with adapters.
        names: of adapters; none for the model without.

    Raises:
        PlanError: there is no such adapter, or one with magnitudes (DoRA) would be added to another.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(32, 32))
    >>> plan = ig.plan(model, scheme="q4_0", example_inputs=(torch.zeros(1, 32),))
    >>> _ = add_adapters(ig.prepare(model, plan), rank=2, name="formal")
    >>> _ = add_adapters(model, rank=2, name="short")
    >>> use_adapters(model, "formal", "short").trainable
    288
    """
    specs = prepared_state(model).adapters
    unknown = next((name for name in names if name not in {spec.name for spec in specs}), None)
    if unknown is not None:
        known = ", ".join(spec.name for spec in specs) or "none"
        raise PlanError(f"There is no adapter {unknown!r}. Known: {known}.")
    chosen = [spec for spec in specs if spec.name in names]
    for spec in chosen:
        clash = next((o for o in chosen if o is not spec and spec.dora and set(o.layers) & set(spec.layers)), None)
        if clash is not None:
            raise PlanError(f"The adapter {spec.name!r} sets norms of rows (DoRA), which {clash.name!r} would change.")
    for layer in _adaptable(model).values():
        adapters = adapters_of(layer)
        if adapters is not None:
            adapters.active = tuple(name for name in adapters if name in names)
            for name, adapter in adapters.items():
                adapter.requires_grad_(name in names)
    _set_specs(model, tuple(replace(spec, active=spec.name in names) for spec in specs))
    return adapter_report(model)


def merge_adapters(model: nn.Module) -> nn.Module:
    """Write the active adapters into the weights and remove all of them; in place, and returned.

    `convert` and `export` need no such call: they see the merged weight anyway. The codes and scales are the same.

    Args:
        model: prepared, with adapters.

    Raises:
        PlanError: the model has no adapters, or a weight is computed, so that nothing can be written.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(32, 32))
    >>> plan = ig.plan(model, scheme="q4_0", example_inputs=(torch.zeros(1, 32),))
    >>> _ = add_adapters(ig.prepare(model, plan), rank=2)
    >>> merge_adapters(model)[0].adapters
    Traceback (most recent call last):
    AttributeError: 'QuantizedLinear' object has no attribute 'adapters'
    """
    if not prepared_state(model).adapters:
        raise PlanError("There are no adapters to merge. Add some with isogrid.add_adapters(model, rank=16).")
    layers = {path: layer for path, layer in _adaptable(model).items() if adapters_of(layer) is not None}
    stored = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for path, layer in layers.items():
        if computes_weight(layer) or base_of(layer).untyped_storage().data_ptr() not in stored:
            raise PlanError(f"The weight of {path!r} is computed, so nothing can be written into it. Use convert.")
    with torch.no_grad():
        owners = {id(adapters_of(layer)): layer for layer in layers.values()}
        for layer in owners.values():
            base_of(layer).copy_(weight_of(layer))
    for layer in layers.values():
        layer.__dict__.pop(ATTRIBUTE, None)
        layer._modules.pop(ATTRIBUTE, None)
    _set_specs(model, ())
    return model


def adapter_report(model: nn.Module) -> AdapterReport:
    """What trains in a prepared model with adapters, and whether it merges exactly.

    Raises:
        PlanError: the model is not prepared.
    """
    specs = prepared_state(model).adapters
    within = {id(p) for module in model.modules() if isinstance(module, Adapters) for p in module.parameters()}
    of_scales = {id(p) for quantizer in quantizers(model).values() for p in quantizer.parameters()}
    training = [p for p in model.parameters() if p.requires_grad]
    return AdapterReport(
        specs,
        trainable=sum(p.numel() for p in training),
        scales=sum(p.numel() for p in training if id(p) in of_scales),
        total=sum(p.numel() for p in model.parameters() if id(p) not in within | of_scales),
        merges_exactly=True,
        statement="What is served is what was trained: quantising the merged weight is what trains.",
    )


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The quantised layers by path, each module once."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLayer | QuantizedTable) and not isinstance(module, QuantizedBatchNorm)
    }


def _check_patterns(patterns: Iterable[str], layers: Mapping[str, nn.Module]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in layers):
            raise PlanError(f"{pattern!r} matches no quantised layer.{nearest(pattern, layers)}")


def _check_rank(model: nn.Module, layers: Sequence[str], rank: int) -> None:
    if rank < 1:
        raise PlanError(f"The rank of an adapter is at least 1, not {rank}.")
    for path in layers:
        shape = base_of(model.get_submodule(path)).shape
        out, rest = shape[0], prod(shape[1:])
        if rank > min(out, rest):
            raise PlanError(
                f"An adapter of rank {rank} does not fit layer {path!r}: its weight is a matrix of {out} by {rest}. "
                f"Use a rank of at most {min(out, rest)}, or leave the layer out: exclude={path!r}."
            )


def _set_specs(model: nn.Module, specs: tuple[AdapterSpec, ...]) -> None:
    setattr(model, STATE_NAME, replace(prepared_state(model), adapters=specs))
