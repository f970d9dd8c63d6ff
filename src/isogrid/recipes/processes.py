"""Independent pieces of work in processes of their own, with their progress told to one listener."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from queue import Empty
from typing import Any, TypeVar

from isogrid.errors import IsogridError
from isogrid.recipes.progress import Advance, Progress

Result = TypeVar("Result")
MOST = 4
"""Processes at most: each takes half a gigabyte."""


def in_processes(
    work: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], progress: Progress
) -> Iterator[tuple[int, Result]]:
    """Do `work(*job, progress)` for every job, as many at a time as there are cores.

    The program that calls this must guard its entry with `if __name__ == "__main__"`: processes import it again.

    Args:
        work: a function of a module.
        jobs: its arguments.
        progress: is told what every process does.

    Yields:
        The number of a job and its result, in the order in which they are done.

    Raises:
        IsogridError: a process was killed; what the work raises is raised here.
    """
    count = min(len(jobs), os.cpu_count() or 1, MOST)
    if count < 2:
        for number, job in enumerate(jobs):
            yield number, work(*job, progress)
        return
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    with ProcessPoolExecutor(count, context, _begin, (events,)) as pool, ExitStack() as stack:
        running: dict[Future[Result], int] = {pool.submit(_call, work, job): n for n, job in enumerate(jobs)}
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        listener = _Listener(progress, events, stack)
        while running:
            done, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
            listener.listen()
            for future in done:
                try:
                    yield running.pop(future), future.result()
                except BrokenProcessPool as error:
                    raise IsogridError("A process was killed from outside. Is there enough memory?") from error
        pool.shutdown()  # a process that ends has sent all it had to say
        listener.listen()


class _Listener:
    """Tells one progress what the processes say."""

    def __init__(self, progress: Progress, events: Any, stack: ExitStack):
        self._progress, self._events, self._stack = progress, events, stack
        self._tasks: dict[str, Advance] = {}

    def listen(self) -> None:
        """Pass on what has come in."""
        while True:
            try:
                kind, *values = self._events.get_nowait()
            except Empty:
                return
            if kind == "task":
                name, *task = values
                self._tasks[name] = self._stack.enter_context(self._progress.task(*task))
            elif kind == "advance":
                name, detail = values
                self._tasks[name](detail)
            else:
                self._progress.message(*values)


class _Speaker:
    """The progress of a process: what it is told, it puts into the queue."""

    def __init__(self, events: Any):
        self._events = events
        self._count = 0

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        self._count += 1
        name = f"{os.getpid()} {self._count}"
        self._events.put(("task", name, title, total, done))
        yield lambda detail: self._events.put(("advance", name, detail))

    def message(self, text: str) -> None:
        self._events.put(("message", text))


_speaker: _Speaker | None = None


def _begin(events: Any) -> None:
    global _speaker
    _speaker = _Speaker(events)
    # Ctrl-C reaches every process; only the first has something to say about it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _call(work: Callable[..., Result], job: tuple[Any, ...]) -> Result:
    return work(*job, _speaker)
