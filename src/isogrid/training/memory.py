"""Memory in training: what runs out of it, and how many bytes tensors hold."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isogrid.errors import MemoryExhaustedError

OF_CPU = ("can't allocate memory", "not enough memory")
"""How PyTorch's allocator on CPUs says that there is no more memory, in a plain RuntimeError."""


@contextmanager
def explained_memory(where: str, advice: str, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """While open, running out of memory is an error that says what to change, and leaves no gradients behind.

    Forward and backward change no weight, so that after them the model is as it was before the step. An optimizer that
    finds no room for its own state, in the first step it takes, may have moved the groups before.

    Args:
        where: what ran, such as `Step 12`.
        advice: what needs less memory, as a sentence.
        parameters: whose gradients are dropped.

    Raises:
        MemoryExhaustedError: torch could not allocate a tensor.

    >>> with explained_memory("Step 3", "Lower training.batch_size."):
    ...     raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    Traceback (most recent call last):
    isogrid.errors.MemoryExhaustedError: Step 3 ran out of memory: CUDA out of memory. Tried to allocate 2 GiB. ...
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not is_out_of_memory(error):
            raise
        for parameter in parameters:
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        first = text.partition("\n")[0].rstrip(".") or type(error).__name__
        raise MemoryExhaustedError(f"{where} ran out of memory: {first}. {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a tensor found no memory, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OF_CPU)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages that tensors lie in, each counted once; those on the meta device have none.

    >>> x = torch.zeros(3, 4)
    >>> tensor_bytes([x, x[0], torch.zeros(2, device="meta")])
    48
    """
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def resting_bytes(model: nn.Module, optimizer: Optimizer | None = None) -> int:
    """Bytes of a model's parameters and buffers, and of its optimizer's state, between two steps."""
    states = [] if optimizer is None else [v for state in optimizer.state.values() for v in state.values()]
    return tensor_bytes([*model.parameters(), *model.buffers(), *(v for v in states if isinstance(v, Tensor))])
