"""The weight of a layer as its operation multiplies by it, however the layer keeps it."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from isogrid.layers.adapters import made_of
from isogrid.layers.intercept import computed_product, own_class
from isogrid.quantizers.sources import make

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight as it is quantised, with the output channels first, differentiable.

    It is the sum of `base_of(module)` and of the layer's adapters.
    """
    base, made = base_of(module), made_of(module)
    return base if made is None else make(base, made)


def base_of(module: nn.Module) -> Tensor:
    """A layer's weight without its adapters, output channels first, differentiable by what it is computed from.

    Computed are weights that are parametrised (`torch.nn.utils.parametrizations`), normed by a hook, pruned, or made by
    the forward of a class that extends a layer. The weight of a transposed convolution, [in, out / groups, *kernel] in
    PyTorch, becomes [out, in / groups, *kernel]. A batch norm is a convolution of each channel by 1, [channels, 1, *1],
    before its factor.

    >>> base_of(nn.ConvTranspose2d(4, 6, 3, groups=2)).shape
    torch.Size([6, 2, 3, 3])
    """
    layer: Any = module
    for rank, kind in enumerate(NORMS, 1):
        if isinstance(module, kind):
            return torch.ones_like(layer.running_mean, dtype=torch.float32).reshape(-1, 1, *[1] * rank)
    if own_class(module) is not None:
        return computed_product(module).weight
    weight = parameter_of(module, "weight")
    if isinstance(module, TRANSPOSED):
        grouped = weight.reshape(module.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return grouped.reshape(module.out_channels, -1, *weight.shape[2:])
    return weight


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """A module's parameter, computed where it is parametrised."""
    parent: Any = module
    parameter: Tensor = parent.parametrizations[name]() if is_parametrized(module, name) else getattr(module, name)
    return parameter


def weight_key(module: nn.Module) -> Hashable:
    """Equal for layers whose weights are one: the same parameter, read in the same way."""
    layer: Any = module
    if hasattr(module, "borrowed_key"):
        return layer.borrowed_key  # type: ignore[no-any-return]
    has_own = module._parameters.get("weight") is not None  # neither computed nor kept as codes
    if not has_own or own_class(module) is not None or isinstance(module, NORMS):
        return id(module)
    return id(layer.weight), isinstance(module, TRANSPOSED)


def computes_weight(module: nn.Module) -> bool:
    """Whether a hook of torch.nn.utils computes a module's weight when it runs: weight_norm, spectral_norm, pruning."""
    return any(computed_by(hook) == "weight" for hook in module._forward_pre_hooks.values())


@torch.no_grad()
def refresh_weights(model: nn.Module) -> None:
    """Compute anew what hooks of torch.nn.utils otherwise compute when a module runs.

    The tensors then hold no history, so that the model can be copied.
    """
    for module in model.modules():
        training, module.training = module.training, False  # in training, a spectral norm would move
        for hook in module._forward_pre_hooks.values():
            if computed_by(hook):
                hook(module, None)
        module.training = training


def computed_by(hook: Any) -> str:
    """The name of the tensor that a hook of torch.nn.utils computes; empty for any other hook."""
    if isinstance(hook, WeightNorm | SpectralNorm):
        return hook.name
    return str(hook._tensor_name) if isinstance(hook, BasePruningMethod) else ""
