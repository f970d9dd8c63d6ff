"""What a step of training makes smaller: the loss on labels, or the distance from a teacher."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from isogrid.recipes.data import Data, size
from isogrid.recipes.folders import RunFolder
from isogrid.recipes.loop import Objective
from isogrid.recipes.schema import DistillationEntry, Recipe
from isogrid.recipes.sources import make_model
from isogrid.recipes.stages import load_float_weights, new_model
from isogrid.training import Distillation, LayerLosses, TeacherCache, TopK, store_teacher, teacher

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


def make_objective(
    recipe: Recipe, model: nn.Module, data: Data, folder: RunFolder, accelerator: "Accelerator"
) -> tuple[Objective | None, Data]:
    """The objective of a recipe and the data that it reads; None, which stands for the data's own loss.

    Args:
        recipe: whose `distillation` says what to learn from.
        model: prepared, the student.
        data: of the recipe.
        folder: of the run, with the float weights.
        accelerator: of the run.

    Raises:
        RecipeError: the teacher cannot be made.
        DistillationError: the teacher does not fit the student.
    """
    entry = recipe.distillation
    if entry is None:
        return None, data
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


def _teacher(
    entry: DistillationEntry, recipe: Recipe, model: nn.Module, folder: RunFolder, accelerator: "Accelerator"
) -> Any:
    if entry.teacher is not None:
        other = make_model(entry.teacher)
        if entry.teacher_weights is not None:
            load_float_weights(other, Path(entry.teacher_weights))
        return teacher(other.to(accelerator.device))
    accelerator.wait_for_everyone()  # the first process writes the float weights
    start = new_model(recipe)
    load_float_weights(start, folder.float_weights)
    return teacher(model, weights=start.state_dict(), format=entry.teacher_format)
