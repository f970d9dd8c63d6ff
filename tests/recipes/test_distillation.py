"""A recipe that distils refuses what makes no sense."""

from pathlib import Path

import pytest
from torch import nn

from isogrid.errors import DistillationError, RecipeError
from isogrid.recipes import runner
from isogrid.recipes.document import parse
from isogrid.recipes.loading import load_recipe, validated
from isogrid.recipes.runner import RunResult, run
from isogrid.recipes.schema import Recipe

RECIPE = """\
model: tests.recipes.tiny:model
data: tests.recipes.tiny:data
scheme: w4a8
training:
  steps: 8
  batch_size: 8
  lr: 1e-2
  log_every: 1
  checkpoint_every: 3
distillation:
  task: 0.25
  features: {"4": 0.1}
"""
STORED = RECIPE.replace("tiny:data", "tiny:plain_data").replace('  features: {"4": 0.1}', "  top: 2")


def recipe(folder: Path, text: str = RECIPE) -> Recipe:
    return validated(parse(f"{text}output: {folder}\n", "recipe.yaml"))


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "finish", lambda *arguments: RunResult((), None, Path()))


def wider() -> nn.Module:
    """Of another number of classes."""
    return nn.Linear(4, 5)


def test_a_teacher_of_other_classes_and_a_store_of_other_data_are_refused(tmp_path: Path) -> None:
    other = RECIPE.replace('features: {"4": 0.1}', "teacher: tests.recipes.test_distillation:wider")
    with pytest.raises(DistillationError, match="teacher has 5 classes and the student 3: another vocabulary"):
        run(recipe(tmp_path / "other", other))
    with pytest.raises(DistillationError, match="made from other data"):  # its examples are augmented at random
        run(recipe(tmp_path / "noisy", STORED.replace("plain_data", "data")))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: 0.25", "task: 2", "distillation.task: must be at most 1"),
        ("task: 0.25", "top: 2", "top classes on disk hold no features"),
        ("task: 0.25", "teacher_weights: w", "name it under teacher"),
        ("task: 0.25", "teacher_format: int9", "unknown"),
        ("task: 0.25", "temprature: 1", "Did you mean 'temperature'"),
    ],
)
def test_a_distillation_that_makes_no_sense_names_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, RECIPE.replace(old, new))
    assert message.lower() in str(caught.value).lower() and "recipe.yaml:" in str(caught.value)


@pytest.mark.parametrize("name", ["qad-nvfp4", "qad-w4a16"])
def test_the_packaged_recipes_distil_without_labels(name: str) -> None:
    for demo in (False, True):
        found = load_recipe(name, demo=demo)
        assert found.distillation is not None and found.distillation.task == 0 and found.runtime == "vllm"
