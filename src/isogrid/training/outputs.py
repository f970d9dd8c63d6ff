"""The logits in whatever a model returns."""

from typing import Any

from torch import Tensor


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a model returns: a tensor, an object with `logits`, or a sequence that begins with them.

    >>> import torch
    >>> logits_of((torch.ones(1), "cache"))
    tensor([1.])
    """
    if isinstance(outputs, Tensor):
        return outputs
    logits: Tensor = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return logits
