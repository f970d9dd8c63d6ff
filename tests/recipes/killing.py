"""Ends runs in the middle of training, and holds two runs against each other."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isogrid.recipes.progress import Silent
from isogrid.recipes.runner import run
from isogrid.recipes.schema import Recipe


class Killed(BaseException):
    """The process ends."""


class Dying(Silent):
    """Ends a process at some moment of a task; in training after a step's update, before its checkpoint."""

    def __init__(self, at: int, task: str = "training"):
        self.left, self.name = at, task

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        def advance(text: str) -> None:
            self.left -= title.startswith(self.name)
            if self.left == 0:
                raise Killed

        yield advance


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint."""
    files = json.loads((folder / "checkpoint" / "checkpoint.json").read_text())["files"]
    return {
        f"{part}.{name}": tensor
        for part, entry in files.items()
        for name, tensor in load_file(folder / "checkpoint" / entry["file"]).items()
    }


def assert_same(found: Path, expected: Path, figures: tuple[str, ...] = ("loss",)) -> dict[str, torch.Tensor]:
    """Two runs have the same figures in every step and the same tensors at the end, which are returned."""
    for name in figures:
        assert scalars(found, name) == scalars(expected, name)
    one, other = tensors(found), tensors(expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    return one


def survives(recipe: Callable[[Path], Recipe], at: int, folder: Path) -> dict[str, torch.Tensor]:
    """A run killed at some step and resumed ends as one that was not: its tensors."""
    run(recipe(folder / "whole"))
    with pytest.raises(Killed):
        run(recipe(folder / "killed"), progress=Dying(at))
    run(recipe(folder / "killed"), resume=True)
    return assert_same(folder / "killed", folder / "whole")
