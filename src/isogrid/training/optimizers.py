"""Optimizers by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from isogrid.errors import MissingExtraError, PlanError


def _adamw_8bit(groups: list[dict[str, Any]]) -> Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "The optimizer 'adamw8bit' needs torchao, which is not installed. Install it with: "
            "pip install 'isogrid[torchao]'"
        ) from error
    made: Optimizer = AdamW8bit(groups)
    return made


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": _adamw_8bit,
    "adam": torch.optim.Adam,
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.9),
}
"""The optimizers by name; each parameter group brings its learning rate. `adamw8bit` is torchao's: moments of 8 bits in
blocks of 256 with a scale each (Dettmers et al., arXiv 2110.02861), where a parameter has 4096 values or more."""


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer of a name, over parameter groups; each group remembers its rate as `initial_lr`.

    Raises:
        PlanError: there is none of this name.
        MissingExtraError: it is another package's, which is not installed.

    >>> optimizer = make_optimizer("adamw", [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5}])
    >>> optimizer.param_groups[0]["initial_lr"]
    0.5
    """
    if name not in OPTIMIZERS:
        raise PlanError(f"Unknown optimizer {name!r}. Known: {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name]([{**group, "initial_lr": group["lr"]} for group in groups])


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a parameter group, which optimizers of torchao keep as a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
