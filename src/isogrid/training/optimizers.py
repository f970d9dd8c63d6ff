"""Optimizers by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamw8bit": _adamw_8bit,
    "adam": partial(torch.optim.Adam, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.9),
}
"""The optimizers by name; each parameter group brings its learning rate. `adamw8bit` is torchao's: moments of 8 bits in
blocks of 256 with a scale each (Dettmers et al., arXiv 2110.02861), where a parameter has 4096 values or more. Those of
torch are fused, which makes nothing on the way; unfused they make up to three copies of the largest parameter on a CPU,
and one of all parameters on a GPU."""


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


@contextmanager
def stepping_in_backward(optimizer: Optimizer) -> Iterator[None]:
    """While open, backward moves each parameter as soon as its gradient is whole, and then lets go of the gradient.

    The gradients of all parameters are never there at once (LOMO, Lv et al., arXiv 2306.09782). The outcome is that of
    a step after backward, bit for bit, for optimizers that treat each parameter by itself, as all of `OPTIMIZERS` do.

    Args:
        optimizer: of parameters without gradients that are worth keeping.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> with stepping_in_backward(optimizer):
    ...     weight.sum().backward()
    >>> weight.data, weight.grad
    (tensor([0.5000, 0.5000]), None)
    """

    def step(parameter: Tensor) -> None:
        optimizer.step()  # of this parameter alone, for no other has a gradient
        parameter.grad = None

    optimizer.zero_grad()
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(step) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
