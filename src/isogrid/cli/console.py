"""The terminal: where results and errors go, and progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from isogrid.recipes.progress import Advance

output = Console()
errors = Console(stderr=True)


class Bars:
    """Progress as bars with the time that is left; to a file or a pipe, one line a task.

    Use as a context manager around the run.
    """

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=errors,
            disable=not errors.is_terminal,
        )

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A bar that goes from `done` to `total`."""
        if not errors.is_terminal:
            errors.print(title, markup=False, highlight=False)
        task = self._bars.add_task(title, total=total, completed=done, detail="")

        def advance(detail: str) -> None:
            self._bars.update(task, advance=1, detail=detail)

        yield advance

    def message(self, text: str) -> None:
        """A line above the bars."""
        errors.print(text, markup=False, highlight=False)
