"""The state of an optimizer as tensors for safetensors and plain values for JSON, and back."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from isogrid.errors import CheckpointError

MOMENTS = "OptimState8bit"
"""The class of torchao's 8-bit moments, which are several tensors each."""


def optimizer_parts(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimizer by path, and everything else."""
    state = optimizer.state_dict()
    return _split({"state": state["state"], "param_groups": dict(enumerate(state["param_groups"]))})


def load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any], source: object) -> None:
    """Load what `optimizer_parts` took apart; raises CheckpointError, naming the source, where it does not fit."""
    state = _joined(tensors, plain)
    groups = state.get("param_groups", {})
    try:
        optimizer.load_state_dict(
            {
                "state": {int(index): values for index, values in state.get("state", {}).items()},
                "param_groups": [groups[str(number)] for number in range(len(groups))],
            }
        )
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"The optimizer in {source} does not fit this one: {error}") from error


def _split(tree: dict[Any, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of nested dictionaries by path, and the dictionaries without them, as JSON has them."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        if type(value).__name__ == MOMENTS:
            names, (signed, dtype) = value.__tensor_flatten__()
            tensors |= {f"{prefix}{key}/{name}": getattr(value, name) for name in names}
            plain[str(key)] = {MOMENTS: {"signed": signed, "dtype": str(dtype).removeprefix("torch.")}}
        elif isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            inner, plain[str(key)] = _split(value, f"{prefix}{key}/")
            tensors.update(inner)
        else:
            plain[str(key)] = value
    return tensors, plain


def _joined(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    """What `_split` took apart."""
    for path, tensor in tensors.items():
        *parents, last = path.split("/")
        place = plain
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = tensor
    return _with_moments(plain)


def _with_moments(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries with the 8-bit moments of torchao put together again."""
    if MOMENTS not in tree:
        return {key: _with_moments(value) if isinstance(value, dict) else value for key, value in tree.items()}
    from torchao.optim.subclass_8bit import OptimState8bit

    how = tree.pop(MOMENTS)
    made: Any = OptimState8bit(**tree, signed=how["signed"], dtype=getattr(torch, how["dtype"]))
    return made  # type: ignore[no-any-return]
