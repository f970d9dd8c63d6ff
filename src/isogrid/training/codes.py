"""Training of scales alone, over weights that are kept as codes."""

from collections import Counter

from torch import nn

from isogrid.errors import PlanError
from isogrid.layers.coded import CodedLinear, coded, why_not_coded
from isogrid.planning.exchange import exchange
from isogrid.planning.state import prepared_state, weight_quantizers


def freeze_codes(model: nn.Module) -> dict[str, str]:
    """Freeze everything but the scales of weights, and keep the weights of linear layers as codes; in place.

    That is EfficientQAT's second stage (E2E-QP, Chen et al., arXiv 2407.11062): codes and zero points stay, and
    `d w^/d s = q - z` trains the scales end to end, with the memory of a model of as many bits. What the model computes
    does not change, bit for bit. Where a format has offsets (`q2_k`), they train too.

    Args:
        model: prepared and calibrated.

    Returns:
        Path and reason of each quantised layer whose weight stays a frozen float parameter. Its scales then train over
        that, so that its codes may still change.

    Raises:
        PlanError: the model is not prepared, or no layer has scales that train.

    >>> import isogrid as ig, torch
    >>> model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    >>> model = ig.prepare(model, ig.plan(model, scheme="w2a16-asym", example_inputs=(torch.zeros(1, 64),)))
    >>> freeze_codes(model)
    {}
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.weight_quantizer.raw_scale']
    >>> model[0].codes.shape, model[0].codes.dtype
    (torch.Size([8, 16]), torch.uint8)
    """
    layers = {layer.path: model.get_submodule(layer.path) for layer in prepared_state(model).plan.layers}
    scales = [q for q in weight_quantizers(model).values() if isinstance(q.raw_scale, nn.Parameter)]
    if not scales:
        raise PlanError(
            "There is nothing to train: no weight has a learned scale. Plan with scale='learned' and the estimator "
            "'lsq' or 'efficientqat'."
        )
    left = {path: reason for path, layer in layers.items() if (reason := _reason(layer)) is not None}
    sites = Counter(layer.weight for layer in prepared_state(model).plan.layers)
    shared = [layer.path for layer in prepared_state(model).plan.layers if sites[layer.weight] > 1]
    left |= {path: "another layer reads the same weight" for path in shared}
    code_layers(model, [path for path, layer in layers.items() if path not in left and not _is_coded(layer)])
    model.requires_grad_(False)
    for quantizer in scales:
        quantizer.raw_scale.requires_grad_(True)
        if isinstance(quantizer.offset, nn.Parameter):
            quantizer.offset.requires_grad_(True)
    return left


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


def _reason(layer: nn.Module) -> str | None:
    return None if _is_coded(layer) else why_not_coded(layer)
