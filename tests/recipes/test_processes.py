"""Work in several processes gives the results of one, and says what it does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from isogrid.errors import IsogridError
from isogrid.recipes import processes
from isogrid.recipes.processes import in_processes
from isogrid.recipes.progress import Advance
from tests.recipes.work import die, double, fail


class Diary:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        self.lines.append(f"{title} {done}/{total}")
        yield lambda detail: self.lines.append(f"{title} {detail}")

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("cores", [1, 2])
def test_results_and_progress_come_from_all_jobs(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.os, "cpu_count", lambda: cores)
    diary = Diary()
    found = dict(in_processes(double, [(1,), (2,), (3,)], diary))
    assert {number: result for number, (result, _) in found.items()} == {0: 2, 1: 4, 2: 6}
    assert (os.getpid() in {process for _, process in found.values()}) == (cores == 1)
    expected = [f"doubling {n} {what}" for n in (1, 2, 3) for what in ("0/2", "half", "done")]
    assert sorted(diary.lines) == sorted([*expected, "doubled 1", "doubled 2", "doubled 3"])


@pytest.mark.parametrize(("work", "message"), [(fail, "cannot be doubled"), (die, "killed from outside")])
def test_what_goes_wrong_in_a_process_is_raised(work: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 2)
    with pytest.raises(IsogridError, match=message):
        list(in_processes(work, [(1,), (2,)], Diary()))  # type: ignore[arg-type]
