"""`isogrid run`: from a recipe to a verified artefact, with checkpoints on the way."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from isogrid.api import restore
from isogrid.errors import NonFiniteError, RecipeError
from isogrid.recipes.data import Data, size
from isogrid.recipes.estimating import estimated
from isogrid.recipes.finishing import RunResult, finish
from isogrid.recipes.folders import RunFolder
from isogrid.recipes.generating import with_generated
from isogrid.recipes.language import LanguageData
from isogrid.recipes.loop import make_accelerator, with_trackers
from isogrid.recipes.objective import companion_groups, learning_teacher, make_objective
from isogrid.recipes.progress import Progress, Silent
from isogrid.recipes.schema import Recipe
from isogrid.recipes.sources import make_data
from isogrid.recipes.stages import (
    adapt,
    by_blocks,
    float_model,
    freeze,
    make_optimizer,
    new_model,
    prepared_model,
    save_float_weights,
    train_quantized,
)
from isogrid.training import load_training, save_training
from isogrid.training.block_files import BlockFiles
from isogrid.training.checkpoint import MANIFEST, read_manifest

if TYPE_CHECKING:
    from accelerate import Accelerator

NO_MATTER: Any = {"output": True, "training": {"log_every", "trackers", "checkpoint_every", "workers"}}
"""Keys that a resumed run may change: its losses stay the same."""


def run(recipe: Recipe, *, resume: bool = False, restart: bool = False, progress: Progress | None = None) -> RunResult:
    """Train by a recipe, then export, verify and report.

    Args:
        recipe: with an output folder.
        resume: go on from the last checkpoint; the losses are those of a run that was never stopped, bit for bit.
        restart: begin anew although the folder holds a checkpoint.
        progress: who is told.

    Raises:
        RecipeError: the recipe names what does not exist, or the folder holds another run.
        CheckpointError: a checkpoint cannot be read, or not be written; the one before it is whole.
        NonFiniteError: the loss is NaN or infinite.
    """
    progress = progress or Silent()
    folder = RunFolder(Path(recipe.output or "runs/unnamed"))
    _check_folder(folder, recipe, resume, restart)
    accelerator = make_accelerator(recipe)
    data = make_data(recipe.data)
    starts_anew = not (resume and folder.has_checkpoint)
    if starts_anew:
        if resume:
            progress.message("There is no checkpoint yet: starting from the beginning.")
        model = float_model(recipe, data, accelerator, progress)
        if accelerator.is_main_process:
            _begin(folder, recipe, model, data)
        data = with_generated(recipe, data, folder, accelerator, progress)
        prepared_model(recipe, model, data, accelerator)
        adapt(recipe, model, progress)
        freeze(recipe, model, progress)
        if not resume:
            BlockFiles(folder.blocks).forget()
        by_blocks(recipe, model, data, folder.blocks, accelerator, progress)
        companion = learning_teacher(recipe, folder, accelerator)
        start, optimizer = 0, make_optimizer(model, recipe.training, companion_groups(recipe, companion))
        progress.message(f"Training takes {estimated(recipe, model, data, accelerator)}.")
    else:
        data = with_generated(recipe, data, folder, accelerator, progress)
        model, optimizer, companion, start = _resumed(folder, recipe, accelerator)
        progress.message(f"Resuming after step {start}.")
    _train(recipe, model, optimizer, companion, data, accelerator, progress, folder, start)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return RunResult((), None, folder.path)
    return finish(recipe, model, data, folder, accelerator, progress)


def _check_folder(folder: RunFolder, recipe: Recipe, resume: bool, restart: bool) -> None:
    if resume and restart:
        raise RecipeError("Give --resume or --restart, not both.")
    if not folder.has_checkpoint or restart:
        return
    if not resume:
        step = read_manifest(folder.checkpoint)["extra"]["step"]
        raise RecipeError(
            f"{folder.path} holds a run that has done {step} steps. Go on with --resume, throw it away with --restart, "
            "or write elsewhere with --set output=FOLDER."
        )
    changed = _first_difference(_relevant(folder.saved_recipe()), _relevant(recipe))
    if changed is not None:
        raise RecipeError(
            f"The run in {folder.path} was started with another recipe: {changed}. "
            "Put it back, or begin anew with --restart."
        )


def _begin(folder: RunFolder, recipe: Recipe, model: nn.Module, data: Data) -> None:
    """Write what a run starts from; an older checkpoint goes first, so that it is never taken for one of this run."""
    (folder.checkpoint / MANIFEST).unlink(missing_ok=True)
    for events in folder.tensorboard.glob("events.*"):
        events.unlink()
    folder.save_recipe(recipe)
    save_float_weights(model, folder.float_weights)
    if isinstance(data, LanguageData):
        data.tokenizer.save_pretrained(folder.tokenizer)


def _resumed(
    folder: RunFolder, recipe: Recipe, accelerator: "Accelerator"
) -> tuple[nn.Module, Optimizer, nn.Module | None, int]:
    model = restore(new_model(recipe), folder.checkpoint).to(accelerator.device)
    companion = learning_teacher(recipe, folder, accelerator)
    optimizer = make_optimizer(model, recipe.training, companion_groups(recipe, companion))
    extra = load_training(folder.checkpoint, model, optimizer, companion)
    return model, optimizer, companion, int(extra["step"])


def _train(
    recipe: Recipe,
    model: nn.Module,
    optimizer: Optimizer,
    companion: nn.Module | None,
    data: Data,
    accelerator: "Accelerator",
    progress: Progress,
    folder: RunFolder,
    start: int,
) -> None:
    from isogrid.recipes.monitor import Monitor

    settings, steps = recipe.training, recipe.training.total_steps(size(data.train))
    with_trackers(recipe, accelerator)
    monitor = Monitor(folder.tensorboard, model, start, accelerator.log) if accelerator.is_main_process else None

    def after_step(step: int, loss: torch.Tensor) -> None:
        last = step == steps
        logs, saves = last or step % settings.log_every == 0, last or step % settings.checkpoint_every == 0
        if (logs or saves) and not math.isfinite(loss):
            raise NonFiniteError(
                f"The loss is {float(loss)} at step {step}. Lower training.lr, or set training.clip_norm. "
                f"{'The last checkpoint is from before.' if folder.has_checkpoint else 'There is no checkpoint yet.'}"
            )
        if monitor is not None and logs:
            monitor.loss(step, loss, optimizer.param_groups[0]["lr"])
            monitor.weights(step)
        if monitor is not None and saves:
            monitor.flush()
            save_training(folder.checkpoint, model, optimizer, {"step": step}, companion)

    objective, data = make_objective(recipe, model, data, folder, accelerator, companion)
    try:
        train_quantized(
            recipe, model, data, accelerator, progress, f"training {recipe.scheme}",
            optimizer=optimizer, objective=objective, companion=companion, start=start, after_step=after_step,
        )  # fmt: skip
    finally:
        if monitor is not None:
            monitor.close()
        for tracker in accelerator.trackers:  # end_training would also part the processes, which have more to do
            tracker.finish()


def _relevant(recipe: Recipe) -> dict[str, Any]:
    """What decides about the losses of a run."""
    return recipe.model_dump(exclude=NO_MATTER)


def _first_difference(before: Any, now: Any, keys: str = "") -> str | None:
    """The first key with another value, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            found = _first_difference(before.get(key), now.get(key), f"{keys}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if before == now else f"{keys} was {json.dumps(before)} and is {json.dumps(now)} now"
