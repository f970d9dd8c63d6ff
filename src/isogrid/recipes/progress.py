"""What a run says while it works; the command line shows it, a program may ignore it."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the command line shows its help without torch
    from isogrid.recipes.data import Data

Advance = Callable[[str], None]
"""Called after each step of a task, with what is worth showing beside it."""


class Progress(Protocol):
    """Who is told about a run."""

    def task(self, title: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """A task of so many steps, some of them done already."""
        ...

    def message(self, text: str) -> None:
        """Something worth a line."""
        ...


class Pace:
    """How fast training is, in what its data are counted in; the mean of the last steps.

    Args:
        data: which say what they are counted in.
        batch_size: examples of a step.
    """

    STEPS = 10

    def __init__(self, data: "Data", batch_size: int):
        count, self._unit = data.pace
        self._per_step = count * batch_size
        self._times: deque[float] = deque([time.perf_counter()], self.STEPS + 1)

    def step(self) -> str:
        """After each step: what to show behind the loss."""
        self._times.append(time.perf_counter())
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        return f", {self._per_step / max(seconds, 1e-9):,.0f} {self._unit}/s"


class Silent:
    """Says nothing.

    >>> with Silent().task("training", 2) as advance:
    ...     advance("loss 0.1")
    """

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        yield lambda detail: None

    def message(self, text: str) -> None:
        pass
