"""Memory in training: what runs out of it, and how many bytes tensors hold."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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
    storages: dict[int, int] = {}
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):  # made of others, such as the 8-bit moments of torchao
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            parts = [tensor]
        storages |= {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in parts if not p.is_meta}
    return sum(storages.values())


def resting_bytes(model: nn.Module, optimizer: Optimizer | None = None) -> int:
    """Bytes of a model's parameters and buffers, and of its optimizer's state, between two steps."""
    states = [] if optimizer is None else [v for state in optimizer.state.values() for v in state.values()]
    return tensor_bytes([*model.parameters(), *model.buffers(), *(v for v in states if isinstance(v, Tensor))])


def peak_bytes(function: Callable[[], object], device: torch.device | None = None) -> int:
    """How many bytes of tensors a function holds at its worst moment, beyond those that were there before.

    It is what PyTorch's allocator hands out and takes back: of the CPU by the profiler's record, of a GPU by its own.

    Args:
        function: called once.
        device: whose memory; the CPU's if not given.

    >>> def function():
    ...     x = torch.zeros(1000)
    ...     y = x + 1
    ...     del x
    ...     return y * 2
    >>> 8000 <= peak_bytes(function) < 9000
    True
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # garbage of an earlier measurement, freed while the function runs, would count as given back
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet_errors():
        profile.start()
    try:
        function()
    finally:
        with _quiet_errors():
            profile.stop()
    now = peak = 0
    results: Any = profile.profiler
    autograd: Any = torch.autograd
    for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == autograd.DeviceType.CPU:
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@contextmanager
def _quiet_errors() -> Iterator[None]:
    """While open, nothing reaches the terminal's error stream: the profiler writes a line there whenever it starts."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
