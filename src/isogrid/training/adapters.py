"""Low-rank adapters for prepared models: fine-tuning by a small part of the numbers.

L4Q (Jeon et al., arXiv 2402.04902) trains `Q(W + s·BA)`: the sum is what the quantizer sees, so that quantising the
merged weight gives the codes that were trained. QA-LoRA (Xu et al., arXiv 2309.14717) moves the zero points or offsets
of groups over frozen codes, and merges as exactly. `Q(W) + s·BA`, which QLoRA (Dettmers et al., arXiv 2305.14314)
trains, is no number of the grid.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import Tensor, nn

from isogrid.errors import PlanError
from isogrid.layers.adapters import ATTRIBUTE, METHODS, Adapter, Adapters, AdapterSpec, Method, adapter_of, adapters_of
from isogrid.layers.coded import CodedLinear, why_not_coded
from isogrid.layers.embedding import QuantizedTable
from isogrid.layers.layer import QuantizedLayer, link
from isogrid.layers.norm import QuantizedBatchNorm
from isogrid.layers.weights import base_of, weight_key
from isogrid.planning.rules import nearest
from isogrid.planning.state import STATE_NAME, prepared_state, quantizers
from isogrid.training.codes import code_layers
from isogrid.training.loftq import Start, loftq

EXACT = "What is served is what was trained: {}."
STATEMENTS: dict[str, str] = {
    "l4q": EXACT.format("the sum of weight and update is what trains, quantised"),
    "qa-lora": EXACT.format("updates move the zero points or offsets of groups, over codes that stay"),
    "qlora": (
        "What is served after merging is NOT what was trained: updates stand beside the quantised weight, and no grid "
        "holds their sum. isogrid.merge_difference(model, batches) measures the difference."
    ),
}
"""What becomes of adapters when they are merged, by their method."""


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
    method: Method = "l4q",
    exclude: str | Sequence[str] = (),
    name: str = "default",
    start: Start = "zero",
    dora: bool = False,
    rank_stabilized: bool = False,
) -> AdapterReport:
    """Give layers of a prepared model low-rank updates `alpha / rank · BA`, and freeze everything else.

    By the method `l4q` (arXiv 2402.04902) the updates are added to the weights before these are quantised: `convert`,
    `export` and `verify` see the merged weight, so that what is served is what was trained, bit for bit. The sum is
    never kept: the memory of a step is that of LoRA. Learned scales of the quantizers go on training.

    By `qa-lora` and `qlora` the weights of linear layers are kept as codes alone, in their formats. `qa-lora` (arXiv
    2309.14717) moves the zero points or offsets of their groups, and merges exactly too. `qlora` (arXiv 2305.14314)
    adds the updates to the layers' outputs; merging quantises anew, and the report says so.

    Args:
        model: prepared.
        rank: of the updates.
        alpha: their weight; rank, if not given.
        match: names of layers, wildcards allowed; a convolution [out, in, ...] is taken as a matrix [out, all others],
            the experts of a mixture share one A, and layers that share a weight share the update. If not given, all
            quantised layers but tables and those that share the weight of one.
        method: `l4q`, `qa-lora` or `qlora`; one for all adapters of a model.
        exclude: names of layers that are left out.
        name: of this adapter. It becomes the active one; others stay, and `use_adapters` brings them back.
        start: `zero`, so that nothing changes at first; or `loftq` for `qlora`: the updates begin with the best
            approximation of what quantisation took away (arXiv 2310.08659).
        dora: the norms of the weight's rows train on their own: DoRA (arXiv 2402.09353).
        rank_stabilized: multiply by `alpha / √rank`: rsLoRA (arXiv 2312.03732).

    Returns:
        How much trains, and whether it merges exactly: print it before training.

    Raises:
        PlanError: the model is not prepared, no layer matches, the name is taken, the rank is above a dimension of a
            layer's weight, or a layer does not allow the method.

    >>> import isogrid as ig, torch
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    >>> plan = ig.plan(model, scheme="q4_0", example_inputs=(torch.zeros(1, 64),))
    >>> report = add_adapters(ig.prepare(model, plan), rank=4, alpha=8)
    >>> report.trainable, report.merges_exactly
    (896, True)
    """
    state = prepared_state(model)
    if name in {spec.name for spec in state.adapters} or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise PlanError(f"{name!r} is no name for a new adapter: it is taken, empty, or holds a dot. Give another.")
    _check_method(state.adapters, method, start, dora)
    chosen = layers_to_adapt(model, match, exclude)
    _check_layers(model, chosen, method)
    _check_rank(model, chosen, rank, method)
    scaled = float(rank if alpha is None else alpha)
    spec = AdapterSpec(name, rank, scaled, tuple(chosen), method, dora, rank_stabilized)
    model.requires_grad_(False)
    if method == "l4q":
        for quantizer in quantizers(model).values():
            quantizer.requires_grad_(True)
    starts = {path: loftq(model.get_submodule(path), spec) for path in chosen if start == "loftq"}
    if method != "l4q":
        code_layers(model, [path for path in chosen if not isinstance(model.get_submodule(path), CodedLinear)])
        model.requires_grad_(False)
    attach(model, spec)
    for path, (a, b) in starts.items():
        adapter = adapter_of(model.get_submodule(path), name)
        adapter.A.data.copy_(a)
        adapter.B.data.copy_(b)
    return use_adapters(model, name)


def layers_to_adapt(
    model: nn.Module, match: str | Sequence[str] | None = None, exclude: str | Sequence[str] = ()
) -> list[str]:
    """Paths of the quantised layers that match, one for each weight.

    Raises:
        PlanError: a pattern matches nothing.
    """
    layers = adaptable(model)
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
    layers = adaptable(model)
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
        adapters[spec.name] = Adapter(_updated(layer, spec.method), spec.rank, spec.scaling, spec.method, spec.dora)
        adapters.train(layer.training)
    set_specs(model, (*prepared_state(model).adapters, spec))


def use_adapters(model: nn.Module, *names: str) -> AdapterReport:
    """Add these adapters to the weights, summed up, and train them; all others rest.

    Args:
        model: prepared, with adapters.
        names: of adapters; none for the model without.

    Raises:
        PlanError: there is no such adapter, or one with magnitudes (DoRA) would be added to another.

    >>> import isogrid as ig, torch
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
    for layer in adaptable(model).values():
        adapters = adapters_of(layer)
        if adapters is not None:
            adapters.active = tuple(name for name in adapters if name in names)
            for name, adapter in adapters.items():
                adapter.requires_grad_(name in names)
    set_specs(model, tuple(replace(spec, active=spec.name in names) for spec in specs))
    return adapter_report(model)


def adapter_report(model: nn.Module) -> AdapterReport:
    """What trains in a prepared model with adapters, and whether it merges exactly.

    Raises:
        PlanError: the model is not prepared.
    """
    specs = prepared_state(model).adapters
    method = specs[0].method if specs else "l4q"
    within = {id(p) for module in model.modules() if isinstance(module, Adapters) for p in module.parameters()}
    of_scales = {id(p) for quantizer in quantizers(model).values() for p in quantizer.parameters()}
    training = [p for p in model.parameters() if p.requires_grad]
    in_codes = [prod(module.coded.shape) for module in model.modules() if isinstance(module, CodedLinear)]
    return AdapterReport(
        specs,
        trainable=sum(p.numel() for p in training),
        scales=sum(p.numel() for p in training if id(p) in of_scales),
        total=sum(p.numel() for p in model.parameters() if id(p) not in within | of_scales) + sum(in_codes),
        merges_exactly=method != "qlora",
        statement=STATEMENTS[method],
    )


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
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


def _check_method(others: Sequence[AdapterSpec], method: str, start: str, dora: bool) -> None:
    if method not in METHODS:
        raise PlanError(f"Unknown method {method!r}.{nearest(method, METHODS)} Known: {', '.join(METHODS)}.")
    if any(spec.method != method for spec in others):
        raise PlanError(f"The model has adapters by the method {others[0].method!r}. Merge them, or use the same one.")
    if start not in ("zero", "loftq"):
        raise PlanError(f"Unknown start {start!r}. Known: zero, loftq.")
    if start == "loftq" and (method != "qlora" or others):
        raise PlanError("LoftQ shares a weight out between codes and the first adapter beside them: method='qlora'.")
    if dora and method != "l4q":
        raise PlanError(f"Norms of rows train where the weight is quantised: dora=True is for 'l4q', not {method!r}.")


def _check_layers(model: nn.Module, paths: Sequence[str], method: str) -> None:
    """Refuse layers in which a method has no place."""
    for path in paths:
        layer: Any = model.get_submodule(path)
        reason = None
        if method == "l4q":
            reason = "its weight is kept as codes alone" if isinstance(layer, CodedLinear) else None
        else:
            reason = None if isinstance(layer, CodedLinear) else why_not_coded(layer)
            if reason is None and (layer.clamp is not None or layer.output_quantizer is not None):
                reason = "its output is quantised"
            if reason is None and method == "qa-lora" and not _has_movable_groups(layer):
                reason = f"its format {layer.weight_quantizer.format} has neither zero points nor offsets of groups"
        if reason is not None:
            raise PlanError(f"Layer {path!r} takes no adapter by {method!r}: {reason}. Leave it out: exclude={path!r}.")


def _has_movable_groups(layer: Any) -> bool:
    fmt = layer.weight_quantizer.format
    scale: Tensor = layer.weight_quantizer.raw_scale
    return (fmt.zero_point or fmt.offset) is not None and scale.dim() == 2 and len(scale) == layer.out_features


def _updated(layer: Any, method: str) -> Tensor:
    """A tensor of the shape and device of what an adapter of a layer updates, [out, ...]."""
    updated: Tensor = layer.weight_quantizer.raw_scale if method == "qa-lora" else base_of(layer)
    return updated.detach()


def _check_rank(model: nn.Module, layers: Sequence[str], rank: int, method: str) -> None:
    if rank < 1:
        raise PlanError(f"The rank of an adapter is at least 1, not {rank}.")
    for path in layers:
        shape = _updated(model.get_submodule(path), method).shape
        out, rest = shape[0], prod(shape[1:])
        what = "its groups are" if method == "qa-lora" else "its weight is"
        if rank > min(out, rest):
            raise PlanError(
                f"An adapter of rank {rank} does not fit layer {path!r}: {what} a matrix of {out} by {rest}. "
                f"Use a rank of at most {min(out, rest)}, or leave the layer out: exclude={path!r}."
            )


def set_specs(model: nn.Module, specs: tuple[AdapterSpec, ...], requantized: tuple[str, ...] = ()) -> None:
    """Write down which adapters a model has, and which ones it had that were merged by quantising anew."""
    state = prepared_state(model)
    requantized = (*state.requantized, *requantized)
    setattr(model, STATE_NAME, replace(state, adapters=specs, requantized=requantized))
