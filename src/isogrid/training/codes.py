"""Frozen parts of a model: their weights are kept as codes, and no more than their scales train."""

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from isogrid.errors import PlanError
from isogrid.layers.coded import CodedLinear, coded, why_not_coded
from isogrid.planning.exchange import exchange
from isogrid.planning.rules import name_matches, nearest
from isogrid.planning.state import prepared_state, weight_quantizers


def freeze_codes(
    model: nn.Module,
    match: str | Sequence[str] | None = None,
    *,
    exclude: str | Sequence[str] = (),
    scales: bool = True,
) -> dict[str, str]:
    """Freeze everything but the scales of weights, and keep the weights of linear layers as codes; in place.

    That is EfficientQAT's second stage (E2E-QP, Chen et al., arXiv 2407.11062): codes and zero points stay, and
    `d w^/d s = q - z` trains the scales end to end, with the memory of a model of as many bits. What the model computes
    does not change, bit for bit. Where a format has offsets (`q2_k`), they train too.

    With names it is done to a part of the model, and the rest goes on training as it did.

    Args:
        model: prepared and calibrated.
        match: names of the modules that freeze, with all that is inside: wildcards, or a regular expression behind
            `re:`, as in rules. All modules if not given.
        exclude: names of those among them that go on training.
        scales: whether scales and offsets of frozen weights train.

    Returns:
        Path and reason of each quantised layer whose weight stays a frozen float parameter. Scales that train over
        such a weight may still change its codes.

    Raises:
        PlanError: the model is not prepared, a name matches nothing, or nothing would train any more.

    >>> import isogrid as ig, torch
    >>> model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    >>> model = ig.prepare(model, ig.plan(model, scheme="w2a16-asym", example_inputs=(torch.zeros(1, 64),)))
    >>> freeze_codes(model, exclude="1")
    {}
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.weight_quantizer.raw_scale', '1.weight', '1.bias']
    >>> model[0].codes.shape, model[0].codes.dtype
    (torch.Size([8, 16]), torch.uint8)
    """
    plan = prepared_state(model).plan
    frozen = _within(model, None if match is None else _listed(match)) - _within(model, _listed(exclude))
    quantizers = [q for path, q in weight_quantizers(model).items() if scales and path in frozen]
    moving = [p for q in quantizers for p in (q.raw_scale, q.offset) if isinstance(p, nn.Parameter)]
    named = model.named_modules(remove_duplicate=False)
    # What a module reads that goes on training, goes on training too.
    kept = {id(p) for path, module in named if path not in frozen for p in module._parameters.values()}
    stopped = [p for p in model.parameters() if id(p) not in kept | {id(p) for p in moving}]
    if not moving and not any(p.requires_grad for p in model.parameters() if id(p) in kept):
        raise PlanError(
            "There is nothing to train: no weight has a learned scale that may move. Plan with scale='learned' and the "
            "estimator 'lsq' or 'efficientqat', or leave layers out with exclude=."
        )
    sites = Counter(layer.weight for layer in plan.layers)
    reasons: dict[str, str | None] = {}
    for layer in plan.layers:
        module = model.get_submodule(layer.path)
        if layer.path in frozen and not isinstance(module, CodedLinear):
            is_shared = sites[layer.weight] > 1 or any(id(p) in kept for p in module.parameters(recurse=False))
            reasons[layer.path] = "another layer reads the same weight" if is_shared else why_not_coded(module)
    code_layers(model, [path for path, reason in reasons.items() if reason is None])
    for parameter in stopped:
        parameter.requires_grad_(False)
    for parameter in moving:
        parameter.requires_grad_(True)
    return {path: reason for path, reason in reasons.items() if reason is not None}


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _within(model: nn.Module, patterns: Iterable[str] | None) -> set[str]:
    """The paths of modules that match, and of all that is inside them; every path without patterns."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    if patterns is None:
        return set(paths)
    found: set[str] = set()
    for pattern in patterns:
        roots = [path for path in paths if path and name_matches(path, pattern)]
        if not roots:
            raise PlanError(f"{pattern!r} matches no module.{nearest(pattern, paths)}")
        found.update(path for path in paths if any(f"{path}.".startswith(f"{root}.") for root in roots))
    return found


def code_layers(model: nn.Module, paths: list[str]) -> None:
    """Keep the weights of these prepared layers as codes."""
    made: dict[nn.Module, nn.Module] = {}
    for path in paths:
        layer = model.get_submodule(path)
        if layer not in made:
            made[layer] = coded(layer)  # type: ignore[arg-type]  # checked there
    exchange(model, made)


def coded_layers(model: nn.Module) -> list[str]:
    """The paths of the layers whose weights are codes."""
    return [path for path, module in model.named_modules() if _is_coded(module)]


def _is_coded(module: nn.Module) -> bool:
    return isinstance(module, CodedLinear)
