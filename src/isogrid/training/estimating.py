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
from isogrid.training.optimizers import make_optimizer

STATE_BYTES = {"adamw": 8.0, "adam": 8.0, "adamw8bit": 2.0 + 8 / 256, "sgd": 4.0}
"""Bytes of optimizer state for each trained value, by the optimizers' names."""


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a run; memory is that of tensors.

    Attributes:
        parameters: parameters and buffers.
        gradients: one for each value that trains.
        optimizer: its state.
        activations: what is made on the way, for a whole batch: by forward and backward, or by the optimizer if more.
        seconds: of forward, backward and the optimizer in all steps.
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
        return f"about {self.peak / 2**20:,.1f} MiB ({listed}) and {self.seconds:,.0f} s of training"


def estimate(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    batch_size: int,
    steps: int,
    optimizer: str = "adamw",
    device: torch.device | None = None,
    accumulation: int = 1,
) -> Estimate:
    """What training will take: counted where it can be counted, and measured on a quarter and half of a batch.

    The model is as it was afterwards, its gradients and buffers too. Compiling, data and evaluation are not in it.

    Args:
        model: as it will train, prepared or not.
        loss: called with a number of examples, gives their loss by the model.
        batch_size: examples of one forward in the run.
        steps: of the run's optimizer.
        optimizer: a name of `isogrid.training.optimizers.OPTIMIZERS`.
        device: where the model is, if it is a GPU.
        accumulation: forwards whose gradients make one step.

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
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    whole, seconds = _forward_and_backward(model, trained, loss, batch_size, device, accumulation > 1)
    on_the_way, seconds_of_step = _own_step(trained, optimizer, device)
    states = sum(p.numel() for p in trained) * STATE_BYTES[optimizer]
    return Estimate(
        parameters=tensor_bytes([*model.parameters(), *model.buffers()]),
        gradients=gradients,
        optimizer=round(states),
        # Where gradients pile up over several forwards, they are there before.
        activations=max(whole if accumulation > 1 else whole - gradients, on_the_way),
        seconds=steps * (accumulation * seconds + seconds_of_step),
    )


def _forward_and_backward(
    model: nn.Module,
    trained: list[nn.Parameter],
    loss: Callable[[int], Tensor],
    batch_size: int,
    device: torch.device | None,
    keeps_gradients: bool,
) -> tuple[int, float]:
    """Peak bytes and seconds of one forward and backward of a whole batch: what two parts of it take, continued."""
    # Two examples at least where there are two: batch norm does not train on one.
    few = max(min(2, batch_size), batch_size // 4)
    counts = (few, max(min(few + 1, batch_size), batch_size // 2))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = [parameter.grad for parameter in trained]

    def step(count: int) -> None:
        value: Any = loss(count)
        value.backward()

    def free() -> None:
        for parameter in trained:
            parameter.grad = None

    peaks, seconds = [], []
    with torch.random.fork_rng():
        for count in counts:
            free()
            step(count)  # compilers are done after this
            if not keeps_gradients:
                free()
            peaks.append(peak_bytes(partial(step, count), device))
            free()
            seconds.append(min(_seconds(partial(step, count), device) for _ in range(2)))
    for parameter, gradient in zip(trained, before, strict=True):
        parameter.grad = gradient
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])

    remaining = (batch_size - counts[1]) / max(1, counts[1] - counts[0])
    whole = seconds[1] + remaining * (seconds[1] - seconds[0])
    # Work on weights is done once, work on examples for each: more than half of a batch, and at most twice as much.
    whole = min(max(whole, seconds[1]), seconds[1] * batch_size / counts[1])
    return round(peaks[1] + remaining * (peaks[1] - peaks[0])), whole


def _own_step(trained: list[nn.Parameter], optimizer: str, device: torch.device | None) -> tuple[int, float]:
    """Bytes that an optimizer makes on the way, and its seconds: those of the largest parameter, and of a small one."""
    largest = max(trained, key=lambda parameter: parameter.numel())
    found = []
    for like in (largest.detach(), largest.detach().flatten()[:1]):
        parameter = nn.Parameter(torch.zeros_like(like))
        parameter.grad = torch.zeros_like(like)
        stepper = make_optimizer(optimizer, [{"params": [parameter], "lr": 1e-5}])
        stepper.step()  # makes its state, and what it compiles
        bytes_on_the_way = peak_bytes(stepper.step, device)
        found.append((bytes_on_the_way, min(_seconds(stepper.step, device) for _ in range(2))))
    (bytes_on_the_way, of_largest), (_, of_each) = found
    values = sum(parameter.numel() for parameter in trained)
    return bytes_on_the_way, len(trained) * of_each + values / largest.numel() * max(0.0, of_largest - of_each)


def _seconds(function: Callable[[], object], device: torch.device | None) -> float:
    """How long a function takes, with what it left to a GPU."""
    start = time.perf_counter()
    function()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
