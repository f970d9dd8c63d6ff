"""Functions that only move values, so that their output lies on their input's grid."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

_POOLS = {f"{adaptive}max_pool{n}d" for adaptive in ("", "adaptive_") for n in (1, 2, 3)}
_POOLS |= {f"{name}_with_indices" for name in _POOLS}

MOVING_FUNCTIONS = frozenset(
    _POOLS
    | set(
        """
    __getitem__ amax amin broadcast_to channel_shuffle chunk clone contiguous detach diagonal expand expand_as flatten
    flip fliplr flipud gather hsplit index_select moveaxis movedim narrow permute pixel_shuffle pixel_unshuffle ravel
    repeat repeat_interleave reshape reshape_as roll rot90 select split split_with_sizes squeeze swapaxes swapdims t
    take_along_dim tensor_split tile transpose tril triu unbind unflatten unfold unsqueeze view view_as vsplit
    """.split()  # noqa: SIM905
    )
)
"""By name. Some put zeros where there was nothing, and zero lies on every grid."""

MOVING_PROPERTIES = frozenset(x.__get__ for x in (Tensor.T, Tensor.mT))  # type: ignore[attr-defined]
"""Attributes of tensors that are such functions."""


def moves(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a torch function only moves values of its first argument, or adds zeros.

    >>> import torch
    >>> moves(torch.max, (torch.ones(2, 2), 1), {}), moves(torch.max, (torch.ones(2), torch.ones(2)), {})
    (True, False)
    """
    name = getattr(function, "__name__", "")
    if name in MOVING_FUNCTIONS or function in MOVING_PROPERTIES:
        return True
    condition = _CONDITIONS.get(name)
    return condition is not None and condition(list(args[1:]), kwargs)


def _argument(position: int, name: str, default: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _pads_zeros_or_values(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    mode = _argument(1, "mode", "constant", args, kwargs)
    return mode != "constant" or _argument(2, "value", None, args, kwargs) in (None, 0)


def _takes_the_nearest(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return str(_argument(2, "mode", "nearest", args, kwargs)).startswith("nearest")


def _fills_zeros(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    value = _argument(1, "value", None, args, kwargs)
    return isinstance(value, int | float) and value == 0


def _is_of_one_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return not any(isinstance(x, Tensor) for x in (*args, *kwargs.values()))


_CONDITIONS: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], bool]] = {
    "pad": _pads_zeros_or_values,
    "interpolate": _takes_the_nearest,
    "masked_fill": _fills_zeros,
    "max": _is_of_one_tensor,
    "min": _is_of_one_tensor,
    "upsample": _takes_the_nearest,
    "upsample_nearest": lambda args, kwargs: True,
}
"""By name, of the arguments behind the first: those that move values only if they are called so."""
