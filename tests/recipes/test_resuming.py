"""Every method that a recipe names goes on after a kill at any step as if nothing had happened."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from isogrid.errors import DistillationError, RecipeError
from isogrid.recipes import runner
from isogrid.recipes.document import parse
from isogrid.recipes.loading import validated
from isogrid.recipes.runner import RunResult, run
from isogrid.recipes.schema import Recipe
from tests.recipes.killing import Dying, survives, tensors

STEPS = 6
VISION = """
model: tests.recipes.tiny:model
data: tests.recipes.tiny:data
scheme: w4a8
training: {steps: 6, batch_size: 8, accumulation: 2, lr: 1e-2, clip_norm: 1.0, log_every: 1, checkpoint_every: 1}
"""
LANGUAGE = """
model: {{name: language-model, arguments: {{layers: 1, hidden: 64, feed_forward: 64, context: 16}}}}
data: {{name: text, arguments: {{train: {folder}/text.txt, tokenizer: {folder}/tokenizer, length: 16}}}}
scheme: {scheme}
calibration: {{batches: 1, batch_size: 2}}
training: {{steps: 6, batch_size: 2, lr: 1e-2, log_every: 1, checkpoint_every: 1}}
"""
PHASES = "distillation: {phases: {self_study: 0.3, co_study: 0.4, teacher_lr: 1e-3}}\n"

# Steps to be killed at: each in another phase, or at a time when another file is written.
CASES = {
    "phases, self-study": (VISION + PHASES, 1),
    "phases, co-study": (VISION + PHASES, 4),
    "phases, tutoring": (VISION + PHASES, 6),
    "features and labels": (VISION + "distillation: {task: 0.25, features: {'4': 0.1}}\n", 3),
    "a stored teacher": (VISION.replace("tiny:data", "tiny:plain_data") + "distillation: {task: 0.25, top: 2}\n", 2),
    "relations": (VISION + "distillation: {relations: {'0': 1.0}, features: {'4': 0.1}, reverse: 0.5}\n", 3),
    "a teacher in 8 bits": (VISION + "distillation: {teacher_format: int8/channel, temperature: 2.0}\n", 3),
    "bfloat16": (VISION.replace("{steps", "{precision: bfloat16, steps"), 4),
}
WRITTEN = {
    "text of the float model": ("q4_0", "distillation: {generate: {sequences: 8, batch_size: 4}}", 4),
    "qa-lora": ("w2a16-asym", "adapters: {rank: 1, method: qa-lora}", 4),
    "qlora": ("nf4-double", "adapters: {rank: 2, method: qlora}", 4),
    "l4q with dora, distilled": ("q4_0", "adapters: {rank: 2, dora: true}\ndistillation: {task: 0.5}", 3),
    "a stored teacher of its own text": (
        "q4_0", "adapters: {rank: 2}\ndistillation: {generate: {sequences: 8}, top: 4}", 3,
    ),
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "finish", lambda *arguments: RunResult((), None, Path()))
    monkeypatch.setattr(runner, "estimated", lambda *arguments: "no time at all")  # another test looks at it


def recipe(text: str, output: Path) -> Recipe:
    return validated(parse(f"{text}\noutput: {output}\n", "recipe.yaml"))


@pytest.mark.parametrize(("text", "at"), CASES.values(), ids=CASES)
def test_a_killed_run_goes_on(text: str, at: int, tmp_path: Path) -> None:
    survives(partial(recipe, text), at, tmp_path)


@pytest.mark.parametrize(("scheme", "more", "at"), WRITTEN.values(), ids=WRITTEN)
def test_a_killed_run_of_a_language_model_goes_on(
    scheme: str, more: str, at: int, folder: Path, tmp_path: Path
) -> None:
    survives(partial(recipe, LANGUAGE.format(folder=folder, scheme=scheme) + more), at, tmp_path)


def test_a_teacher_that_learns_along_moves_in_co_study_alone(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Looking(Dying):
        """Looks at the checkpoint of each step before the next one is written."""

        @contextmanager
        def task(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
            yield lambda text: seen.append(tensors(tmp_path)) if (tmp_path / "checkpoint").is_dir() else None

    run(recipe(VISION + PHASES, tmp_path), progress=Looking(0))
    seen.append(tensors(tmp_path))
    weights = [step["companion.0.weight"] for step in seen]
    moves = [not torch.equal(before, after) for before, after in pairwise(weights)]
    # 6 steps: 0 and 1 of self-study, 2 and 3 of co-study, 4 and 5 of tutoring.
    assert moves == [False, True, True, False, False]
    students = [step["model.0.weight"] for step in seen]
    assert all(not torch.equal(before, after) for before, after in pairwise(students))


def test_what_the_float_model_writes_is_learned_and_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isogrid.recipes import generating

    seen: list[torch.Tensor] = []
    text = LANGUAGE.format(folder=folder, scheme="w4a16") + "distillation: {generate: {sequences: 3}}"
    original = runner.prepared_model
    monkeypatch.setattr(
        runner,
        "prepared_model",
        lambda recipe, model, data, accelerator: (
            seen.extend(data.train[index][0] for index in range(len(data.train))),
            original(recipe, model, data, accelerator),
        )[1],
    )
    run(recipe(text, tmp_path))
    assert [len(ids) for ids in seen] == [16, 16, 16]
    monkeypatch.setattr(generating, "generate_text", None)  # what is kept is not written again
    run(recipe(text, tmp_path), restart=True)
    assert all(torch.equal(before, after) for before, after in zip(seen[:3], seen[3:], strict=True))
    with pytest.raises(TypeError):
        run(recipe(text.replace("sequences: 3", "sequences: 4"), tmp_path), restart=True)


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="only language models write text"):
        run(recipe(VISION + "distillation: {generate: {sequences: 3}}", tmp_path))
    wider = "distillation: {teacher: tests.recipes.test_distillation:wider, phases: {}}"
    with pytest.raises(DistillationError, match="teacher has 5 classes and the student 3"):
        run(recipe(VISION + wider, tmp_path))
    for entry, message in (
        ("{phases: {}, task: 0.5, top: 3}", "leave out task, top"),
        ("{phases: {self_study: 0.7, co_study: 0.7}}", "together at most 1"),
        ("{generate: {}}", r"generate\.sequences: missing"),
        ("{generate: {sequences: 0}}", "must be at least 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe(VISION + f"distillation: {entry}", tmp_path)
    with pytest.raises(RecipeError, match="qlora keeps the frozen weights as codes"):
        recipe(VISION + "distillation: {task: 0.5}\nadapters: {method: qlora}", tmp_path)
