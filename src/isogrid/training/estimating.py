"""What a training run will take, measured on a part of its first step before it starts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import PlanError
from isogrid.training.memory import peak_bytes, tensor_bytes

STATE_BYTES = {"adamw": 8.0, "adam": 8.0, "adamw8bit": 2.0 + 8 / 256, "sgd": 4.0}
"""Bytes of optimizer state for each trained value, by the optimizers' names."""


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a run; memory is that of tensors.

    Attributes:
        parameters: parameters and buffers.
        gradients: one for each value that trains.
        optimizer: its state.
        activations: what forward and backward hold besides, for a whole batch.
        seconds: of all steps; those of the optimizer itself are not in it.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a step."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = {"parameters": self.parameters, "gradients": self.gradients, "optimizer": self.optimizer,
                 "activations": self.activations}  # fmt: skip
        listed = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in parts.items())
        return f"about {self.peak / 2**20:,.1f} MiB ({listed}) and {self.seconds:,.0f} s of forward and backward"


def estimate(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    batch_size: int,
    steps: int,
    optimizer: str = "adamw",
    device: torch.device | None = None,
) -> Estimate:
    """What training will take: counted where it can be counted, and measured on a quarter and half of a batch.

    The model is as it was afterwards, its gradients and buffers too.

    Args:
        model: as it will train, prepared or not.
        loss: called with a number of examples, gives their loss by the model.
        batch_size: examples of one forward in the run.
        steps: of the run.
        optimizer: a name of `isogrid.training.optimizers.OPTIMIZERS`.
        device: where the model is, if it is a GPU.

    Raises:
        PlanError: nothing trains, or there is no such optimizer.

    >>> model = nn.Sequential(nn.Linear(8, 8, bias=False))
    >>> found = estimate(model, lambda count: model(torch.ones(count, 8)).sum(), batch_size=4, steps=10)
    >>> found.parameters, found.gradients, found.optimizer
    (256, 256, 512)
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise PlanError("There is nothing to train: all parameters are frozen.")
    if optimizer not in STATE_BYTES:
        raise PlanError(f"Unknown optimizer {optimizer!r}. Known: {', '.join(STATE_BYTES)}.")
    # Two examples at least where there are two: batch norm does not train on one.
    few = max(min(2, batch_size), batch_size // 4)
    counts = (few, max(min(few + 1, batch_size), batch_size // 2))
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = [parameter.grad for parameter in trained]

    def free() -> None:
        for parameter in trained:
            parameter.grad = None

    def step(count: int) -> None:
        value: Any = loss(count)
        value.backward()

    with torch.random.fork_rng():
        peaks, seconds = [], 0.0
        for count in counts:
            step(count)  # compilers are done after this
            free()
            peaks.append(peak_bytes(partial(step, count), device))
            free()
            start = time.perf_counter()
            step(count)
            seconds = time.perf_counter() - start
            free()
    for parameter, gradient in zip(trained, before, strict=True):
        parameter.grad = gradient
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])

    slope = (peaks[1] - peaks[0]) / max(1, counts[1] - counts[0])
    whole = round(peaks[1] + slope * (batch_size - counts[1]))
    states = sum(p.numel() for p in trained) * STATE_BYTES[optimizer]
    return Estimate(
        parameters=tensor_bytes([*model.parameters(), *model.buffers()]),
        gradients=gradients,
        optimizer=round(states),
        activations=max(0, whole - gradients),
        seconds=steps * seconds * batch_size / counts[1],
    )
