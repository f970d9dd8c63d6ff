"""What a run says while it works; the command line shows it, a program may ignore it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

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
