"""Activation checkpointing: blocks keep their inputs, and compute the rest again when its gradient is due."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from isogrid.training.blocks import find_blocks


def checkpoint_activations(model: nn.Module, blocks: str | None = None) -> tuple[str, ...]:
    """Let each block keep no more than its inputs in training, in place (Chen et al., arXiv 1604.06174).

    Backward runs the block's forward once more, with the same random numbers, so that losses and gradients are the
    same, bit for bit. Without gradients, and in evaluation, nothing is different.

    Args:
        model: float or prepared; observers and moving ranges would see each batch twice, so calibrate before.
        blocks: pattern of their paths; found by itself if not given.

    Returns:
        The paths of the blocks.

    Raises:
        PlanError: no blocks are found.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> checkpoint_activations(model)
    ('0', '1')
    """
    found = find_blocks(model, blocks)
    for path in found:
        module: Any = model.get_submodule(path)
        if not isinstance(vars(module).get("forward"), partial):
            module.forward = partial(_recomputed, module, module.forward)
    return found


def _recomputed(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
