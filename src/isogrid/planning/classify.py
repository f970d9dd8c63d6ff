"""What a module or a call is, before anyone decides about it."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from isogrid.errors import PlanError
from isogrid.layers import activations, elementwise, matmul, where
from isogrid.layers.borrowed import BorrowedLinear
from isogrid.layers.experts import BorrowedExperts
from isogrid.layers.intercept import computes_as_linear
from isogrid.layers.lent import BorrowedConv1d, BorrowedConv2d, BorrowedConv3d
from isogrid.layers.pooling import averages_space, pooling_of
from isogrid.layers.recurrent import Gates
from isogrid.layers.scope import is_container, operands_of
from isogrid.layers.weights import computes_weight, weight_of
from isogrid.planning.stubs import stub_of

MODULE_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    BorrowedLinear: "linear",
    BorrowedExperts: "experts",
    BorrowedConv1d: "convolution",
    BorrowedConv2d: "convolution",
    BorrowedConv3d: "convolution",
    nn.Conv1d: "convolution",
    nn.Conv2d: "convolution",
    nn.Conv3d: "convolution",
    nn.ConvTranspose1d: "convolution",
    nn.ConvTranspose2d: "convolution",
    nn.ConvTranspose3d: "convolution",
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
}
"""Modules that are one call."""

ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
"""Modules that call one of `isogrid.layers.activations.ACTIVATIONS`."""


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module of torch.nn merely calls one function: nn.ReLU, nn.MaxPool2d.

    It has no children, and no parameters but those that the function takes as they are, as nn.PReLU.
    """
    return (
        _is_of_torch(module)
        and layer_type(module) is None
        and next(module.children(), None) is None
        and (type(module) is nn.PReLU or next(module.parameters(), None) is None)
    )


def calls_site(module: nn.Module) -> bool:
    """Whether a module of torch.nn calls a function that can be a site."""
    pools = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    return isinstance(module, (nn.ReLU, nn.Hardtanh, nn.GLU, *ACTIVATIONS, *pools)) and is_wrapper(module)


def is_one_call(module: nn.Module) -> bool:
    """Whether nothing inside a module is looked at.

    So it is for layers, for modules of torch.nn with parameters of their own such as nn.LayerNorm, and for
    subclasses of layers.
    """
    if layer_type(module) is not None or is_subclass_of_layer(module) or isinstance(module, Gates):
        return True
    return _is_of_torch(module) and not is_wrapper(module) and next(module.parameters(recurse=False), None) is not None


def layer_type(module: nn.Module) -> type[nn.Module] | None:
    """The class of `MODULE_KINDS` whose forward a module runs: its own, or that of the class it extends, unchanged.

    >>> class Wide(nn.Conv2d):
    ...     pass
    >>> layer_type(Wide(1, 1, 1)).__name__, layer_type(nn.ReLU())
    ('Conv2d', None)
    """
    if type(module) in MODULE_KINDS:
        return type(module)
    if computes_as_linear(module):
        return nn.Linear
    found = next((kind for kind in MODULE_KINDS if isinstance(module, kind)), None)
    if found is None or any(_of(type(module), name) is not _of(found, name) for name in _DECIDES_FORWARD):
        return None
    computed = [name for name in ("weight", "bias") if isinstance(_of(type(module), name), property)]
    return found if all(name == "weight" and is_parametrized(module, name) for name in computed) else None


def kind_of(module: nn.Module) -> str:
    """The kind of call that a module is: that of its layer, or float."""
    found = layer_type(module)
    return "float" if found is None else MODULE_KINDS[found]


def kind_of_extended(module: nn.Module) -> str:
    """The kind of the layer that a class with a forward of its own extends."""
    return next(kind for layer, kind in MODULE_KINDS.items() if isinstance(module, layer))


_DECIDES_FORWARD = ("__call__", "_call_impl", "forward", "_conv_forward", "_output_padding")


def _of(kind: type[nn.Module], name: str) -> Any:
    return getattr(kind, name, None)


def is_subclass_of_layer(module: nn.Module) -> bool:
    """Whether a module extends a layer that could be quantised, and has no layers of its own inside."""
    extends = isinstance(module, tuple(MODULE_KINDS)) and layer_type(module) is None
    return extends and (next(module.children(), None) is None or is_parametrized(module))


def is_sequential(module: nn.Module) -> bool:
    """Whether a module has nothing but nn.Sequential's forward."""
    return type(module).forward is nn.Sequential.forward


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward calls functions and other modules, so that it is a scope."""
    runs = type(module).forward is not nn.Module.forward and not is_sequential(module)
    is_call_of_torch = is_one_call(module) and (layer_type(module) is not None or _is_of_torch(module))
    return runs and not is_wrapper(module) and not is_call_of_torch and stub_of(module) is None


def has_fast_path(module: nn.Module) -> bool:
    """Whether PyTorch may compute a module in evaluation from its children's weights, without calling them."""
    return isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer)


def why_float(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> str:
    """Why a call of a function that could be a site is none; empty where it is one.

    Args:
        func: the torch function.
        name: of the site; see `isogrid.layers.scope.OPERATION_KINDS`.
        args, kwargs: with the tensors in front.
        output: what came out.
    """
    if kwargs.get("out") is not None:
        return "writes to out="
    operands = operands_of(name, args)
    tensors = [x for x in operands if isinstance(x, Tensor)]
    if not all(x.is_floating_point() for x in tensors):
        return f"{name} of whole numbers"
    if name == "where":
        return where.why_float(args)
    if func in elementwise.NAMES:
        return elementwise.why_float(func, operands, kwargs, output)
    if len(tensors) < len(operands) or any(x.dim() == 0 for x in tensors):
        return f"{name} with a number, which has no grid"
    if func in matmul.NAMES:
        return matmul.why_float(func, operands)
    if name == "mean" and not averages_space(*args, **kwargs):
        return "mean over something else than all of space of [batch, channels, *space]"
    if name in ("average_pool", "mean"):
        return _why_pooling_is_float(func, args, kwargs)
    if func in activations.NAMES:
        return _why_activation_is_float(func, args, kwargs)
    return ""


def why_module_is_float(module: nn.Module, output: Tensor) -> str:
    """Why a module that was called as one is not quantised, where its kind alone does not say; else empty."""
    if isinstance(module, Gates):
        return "the gates of a recurrent layer are elementwise and compute in float"
    if layer_type(module) is not None and "weight" in vars(module) and not computes_weight(module):
        return "its weight is a plain tensor, which some code of the model's own computes"
    if kind_of(module) == "batch_norm" and getattr(module, "running_mean", None) is None:
        return "without running statistics it normalises by each batch, which no runtime does in integers"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (module.max_norm is not None or module.sparse):
        return "an embedding with max_norm or sparse gradients changes its table behind the quantiser's back"
    if kind_of(module) == "convolution" and output.dim() != weight_of(module).dim():
        return "a convolution of one example without a batch dimension; pass a batch of one"
    return ""


def _why_activation_is_float(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    try:
        call = activations.applied(func, args[1:], kwargs)
    except PlanError as error:
        return str(error)
    if call.slopes is not None and call.slopes.numel() > 1 and args[0].dim() < 2:
        return "prelu of one example without a batch dimension"
    return ""


def _why_pooling_is_float(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    rank = int(getattr(func, "__name__", "")[-2:-1]) if func.__name__.endswith("d") else 0
    if rank and args[0].dim() != rank + 2:
        return "pooling of one example without a batch dimension"
    try:
        pooling = pooling_of(func, *args, **kwargs)
    except PlanError as error:
        return str(error)
    if pooling.ceil_mode and pooling.count_include_pad and any(pooling.padding):
        return "with ceil_mode, count_include_pad and padding PyTorch and ONNX divide by different numbers"
    if prod(pooling.kernel) == 0:
        return "pooling of nothing"
    return ""


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules") and not is_container(module)
