"""What a step of training makes smaller: the loss on labels, or the distance from a teacher."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from isogrid.errors import RecipeError
from isogrid.planning.evaluating import evaluating
from isogrid.planning.state import steps_done
from isogrid.recipes.data import Data, collate, size
from isogrid.recipes.folders import RunFolder
from isogrid.recipes.loop import Objective, float_groups, on_device
from isogrid.recipes.schema import DistillationEntry, Recipe
from isogrid.recipes.sources import make_model
from isogrid.recipes.stages import load_float_weights, model_with
from isogrid.training import (
    Distillation,
    LayerLosses,
    TeacherCache,
    ThreePhases,
    TopK,
    kl_divergence,
    store_teacher,
    teacher,
)
from isogrid.training.outputs import logits_of

if TYPE_CHECKING:
    from accelerate import Accelerator


class Taught(Dataset[Any]):
    """Examples whose target also holds what a teacher on disk says about them."""

    def __init__(self, dataset: Dataset[Any], cache: TeacherCache):
        self.dataset, self.cache = dataset, cache

    def __len__(self) -> int:
        return size(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        *inputs, target = self.dataset[index]
        top = self.cache[[index]]
        return (*inputs, (target, top.log_probabilities[0], top.classes[0], top.log_rest[0]))


def learning_teacher(recipe: Recipe, folder: RunFolder, accelerator: "Accelerator") -> nn.Module | None:
    """The teacher that learns along with the student, where the recipe has phases.

    Args:
        recipe: of the run.
        folder: with the float weights.
        accelerator: of the run.

    Raises:
        RecipeError: it cannot be made, or there are several processes.
    """
    entry = recipe.distillation
    if entry is None or entry.phases is None:
        return None
    if accelerator.num_processes > 1:
        raise RecipeError(
            "distillation.phases: a teacher that learns along does so in one process. Start the run without torchrun."
        )
    other = _other_teacher(entry) if entry.teacher is not None else model_with(recipe, folder.float_weights)
    return other.to(accelerator.device)


def companion_groups(recipe: Recipe, companion: nn.Module | None) -> list[dict[str, Any]]:
    """The parameter groups of a teacher that learns along; none where there is none."""
    if companion is None or recipe.distillation is None or recipe.distillation.phases is None:
        return []
    rate = recipe.distillation.phases.teacher_lr or recipe.training.lr
    return float_groups(companion, recipe.training.model_copy(update={"lr": rate}))


def make_objective(
    recipe: Recipe,
    model: nn.Module,
    data: Data,
    folder: RunFolder,
    accelerator: "Accelerator",
    companion: nn.Module | None = None,
) -> tuple[Objective | None, Data]:
    """The objective of a recipe and the data that it reads; None, which stands for the data's own loss.

    Args:
        recipe: whose `distillation` says what to learn from.
        model: prepared, the student.
        data: of the recipe.
        folder: of the run, with the float weights.
        accelerator: of the run.
        companion: of `learning_teacher`.

    Raises:
        RecipeError: the teacher cannot be made.
        DistillationError: the teacher does not fit the student.
    """
    entry = recipe.distillation
    if entry is None:
        return None, data
    if companion is not None:
        return _in_phases(recipe, model, companion, data), data
    guide = _teacher(entry, recipe, model, folder, accelerator)
    distillation = Distillation(entry.temperature, entry.task, entry.reverse)
    if entry.top is not None:
        where = folder.path / "teacher"
        if accelerator.is_main_process:
            device = accelerator.device
            store_teacher(guide, data.train, where, entry.top, temperature=entry.temperature, device=device)
        accelerator.wait_for_everyone()
        cache = TeacherCache(where, data.train, guide)
        return _from_cache(distillation, cache, data), replace(data, train=Taught(data.train, cache))
    layers = None
    if entry.features or entry.relations:
        layers = LayerLosses(model, guide, entry.features, entry.relations, entry.heads)

    def loss(trained: nn.Module, inputs: list[Any], target: Any) -> Tensor:
        # The teacher first: no graph needs memory yet.
        said = guide(*inputs)
        found = distillation(trained(*inputs), said, target, task_loss=data.loss, overwrite_teacher=True)
        return found if layers is None else found + layers.loss()

    return loss, data


def _from_cache(distillation: Distillation, cache: TeacherCache, data: Data) -> Objective:
    vocabulary, temperature = cache.manifest["vocabulary"], cache.manifest["temperature"]

    def loss(trained: nn.Module, inputs: list[Any], target: Any) -> Tensor:
        labels, logs, classes, rest = target
        said = TopK(logs, classes, rest, vocabulary, temperature)
        return distillation(trained(*inputs), said, labels, task_loss=data.loss)

    return loss


def _in_phases(recipe: Recipe, model: nn.Module, companion: nn.Module, data: Data) -> Objective:
    """QKD's losses, by the position of the student's schedule."""
    entry = recipe.distillation
    assert entry is not None and entry.phases is not None
    phases = ThreePhases(
        recipe.training.total_steps(size(data.train)), entry.phases.self_study, entry.phases.co_study, entry.temperature
    )
    _check_same_classes(model, companion, data)

    def loss(trained: nn.Module, inputs: list[Any], target: Any) -> Tensor:
        step = int(steps_done(model))
        stage = phases.stage(step)
        companion.train(stage == "co-study")
        with torch.set_grad_enabled(stage == "co-study"):
            said = None if stage == "self-study" else companion(*inputs)
        return phases.loss(step, trained(*inputs), said, target, data.loss)

    return loss


@torch.no_grad()
def _check_same_classes(model: nn.Module, companion: nn.Module, data: Data) -> None:
    """Raise DistillationError before training, and not when self-study is over."""
    *inputs, _ = on_device(collate(data.train, range(min(2, size(data.train)))), next(model.parameters()).device)
    with evaluating(model), evaluating(companion):
        kl_divergence(logits_of(model(*inputs)), logits_of(companion(*inputs)))


def _teacher(
    entry: DistillationEntry, recipe: Recipe, model: nn.Module, folder: RunFolder, accelerator: "Accelerator"
) -> Any:
    if entry.teacher is not None:
        return teacher(_other_teacher(entry).to(accelerator.device))
    accelerator.wait_for_everyone()  # the first process writes the float weights
    return teacher(model, weights=model_with(recipe, folder.float_weights).state_dict(), format=entry.teacher_format)


def _other_teacher(entry: DistillationEntry) -> nn.Module:
    assert entry.teacher is not None
    other = make_model(entry.teacher)
    if entry.teacher_weights is not None:
        load_float_weights(other, Path(entry.teacher_weights))
    return other
