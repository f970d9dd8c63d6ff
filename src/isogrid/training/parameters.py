"""Parameter groups for optimizers: scales train by rules of their own."""

from typing import Any

from torch import nn

from isogrid.errors import NotCalibratedError, PlanError
from isogrid.layers.adapters import Adapters
from isogrid.planning.state import prepared_state, quantizers


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    scale_lr: float | None = None,
    relative_scale_lr: bool = True,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: adapters and weights with decay, biases and norms without, scales by themselves.

    Adam moves every parameter by about its learning rate a step, whatever the gradient; so the learning rate of a scale
    is a share of the scale itself: each quantizer gets a group with `scale_lr` times its mean scale, of whatever sign.
    Learned zero points are whole codes, so that theirs is `scale_lr` codes, in a group of its own.

    Args:
        model: prepared.
        lr: of everything but scales.
        weight_decay: of weights; scales, biases and norms have none.
        scale_lr: by what share of itself a scale may move a step; `lr` where not given.
        relative_scale_lr: False for SGD, whose steps already follow LSQ's scaled gradient: `scale_lr` as it is.

    Returns:
        Groups with `name`, `params`, `lr` and `weight_decay`; each trainable parameter is in exactly one.

    Raises:
        PlanError: the model is not prepared, or nothing in it trains.
        NotCalibratedError: a learned scale has no value yet that its learning rate could be a share of.

    >>> import isogrid as ig, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> plan = ig.plan(model, scheme="w8a8", example_inputs=(torch.zeros(1, 4),))
    >>> ig.calibrate(ig.prepare(model, plan), [torch.ones(1, 4)]) is model
    True
    >>> [group["name"] for group in parameter_groups(model, lr=1e-3)]
    ['weights', 'others', '0.weight_quantizer', '0.input_quantizer']
    """
    prepared_state(model)
    return groups_of(model, lr, weight_decay, scale_lr, relative_scale_lr)


def groups_of(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    scale_lr: float | None = None,
    relative_scale_lr: bool = True,
) -> list[dict[str, Any]]:
    """`parameter_groups` of any part of a prepared model."""
    scale_lr = lr if scale_lr is None else scale_lr
    scales = {id(p): (name, q) for name, q in quantizers(model).items() for p in q.parameters()}
    low_rank = {id(p) for module in model.modules() if isinstance(module, Adapters) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise PlanError(
            "Nothing in this model trains: all its parameters are frozen. Add adapters with isogrid.add_adapters, or "
            "let some parameters train again with requires_grad_(True)."
        )
    adapters = [p for p in trained if id(p) in low_rank]
    trainable = [p for p in trained if id(p) not in scales and id(p) not in low_rank]
    groups: list[dict[str, Any]] = [
        {"name": "adapters", "params": adapters, "lr": lr, "weight_decay": weight_decay},
        {"name": "weights", "params": [p for p in trainable if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"name": "others", "params": [p for p in trainable if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    for name, quantizer in quantizers(model).items():
        zero_point = quantizer.zero_point
        parameters = [p for p in quantizer.parameters() if p.requires_grad and p is not zero_point]
        if parameters and relative_scale_lr and not quantizer.is_calibrated:
            raise NotCalibratedError(
                f"The learned scale of {name} has no value yet that its learning rate could be a share of. Run "
                "isogrid.calibrate(model, batches) first, or pass relative_scale_lr=False."
            )
        if parameters:
            factor = float(quantizer.scale.detach().abs().mean()) if relative_scale_lr else 1.0
            groups.append({"name": name, "params": parameters, "lr": scale_lr * factor, "weight_decay": 0.0})
        if isinstance(zero_point, nn.Parameter) and zero_point.requires_grad:
            groups.append({"name": f"{name}.zero_point", "params": [zero_point], "lr": scale_lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
