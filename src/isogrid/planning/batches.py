"""Batches as a loader gives them: none is empty, and a model takes of each what its plan knows."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from isogrid.errors import NotCalibratedError
from isogrid.planning.arguments import Arguments


def filled_batches(batches: Iterable[Any], purpose: str) -> Iterator[Any]:
    """The batches, one after the other, all of which hold something.

    Args:
        batches: as for `isogrid.calibrate`.
        purpose: what they are for, as the end of a sentence.

    Raises:
        NotCalibratedError: there is no batch, or one holds nothing or a tensor without elements.

    >>> import torch
    >>> list(filled_batches([torch.ones(1), torch.ones(0)], "to calibrate with"))
    Traceback (most recent call last):
    isogrid.errors.NotCalibratedError: Batch 1 is empty, so there is nothing to calibrate with. Leave it out.
    """
    seen = False
    for number, batch in enumerate(batches):
        leaves = tree_leaves(batch)
        if not leaves or any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in leaves):
            raise NotCalibratedError(f"Batch {number} is empty, so there is nothing {purpose}. Leave it out.")
        seen = True
        yield batch
    if not seen:
        raise NotCalibratedError(f"There is no batch {purpose}. Pass at least one.")


def run_batch(model: nn.Module, batch: Any, arguments: Arguments) -> Any:
    """Run a model on a batch as a loader gives it; see `Arguments.of_batch`.

    >>> import torch
    >>> from isogrid.planning.arguments import InputSpec
    >>> x = InputSpec((1,), "float32", "input")
    >>> run_batch(nn.Identity(), (torch.ones(1), "label"), Arguments((x,), {}, ("input",)))
    tensor([1.])
    """
    positional, named = arguments.filled(arguments.of_batch(batch))
    return model(*positional, **named)
