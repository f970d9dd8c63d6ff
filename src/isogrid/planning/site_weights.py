"""The values that the scale of a weight's site is for."""

import torch
from torch import Tensor, nn

from isogrid.layers.weights import weight_key, weight_of
from isogrid.planning.plan import Plan


def weight_at(model: nn.Module, plan: Plan, site: str) -> Tensor:
    """The weight of a site, detached; of layers that share one scale, all their values in a row [1, values].

    Args:
        model: float or prepared.
        plan: of it.
        site: such as `fc.weight`.
    """
    modules = [model.get_submodule(layer.path) for layer in plan.layers if layer.weight == site]
    weights = [weight_of(module).detach() for module in {weight_key(module): module for module in modules}.values()]
    return weights[0] if len(weights) == 1 else torch.cat([weight.flatten() for weight in weights]).unsqueeze(0)
