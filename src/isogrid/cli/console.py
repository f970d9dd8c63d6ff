"""The terminal: where results and errors go, and progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from isogrid.recipes.progress import Advance

output = Console()
errors = Console(stderr=True)


class Bars:
    """Progress as bars with the time that is left; to a file or a pipe, one line a task.

    Use as a context manager around the run.
    """

    def __init__(self) -> None:
        # Wide enough for what there is to say, and narrow enough for 80 columns.
        self._bars = Progress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            _TimeColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=errors,
            disable=not errors.is_terminal,
        )

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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


class _TimeColumn(ProgressColumn):
    """The time that a task still takes, or has taken."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        seconds, word = (task.finished_time, "") if task.finished else (task.time_remaining, " left")
        if seconds is None:
            return Text()
        hours, minutes = divmod(int(seconds) // 60, 60)
        clock = f"{hours}:{minutes:02}" if hours else f"{minutes}"
        return Text(f"{clock}:{int(seconds) % 60:02}{word}", style="progress.remaining")
