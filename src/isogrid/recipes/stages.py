"""The stages of a run: a float model, a prepared model, training. Runs and the quickstart are made of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim import Optimizer

from isogrid.api import (
    Blockwise,
    add_adapters,
    calibrate,
    checkpoint_activations,
    freeze_codes,
    parameter_groups,
    plan,
    prepare,
    train_blockwise,
)
from isogrid.errors import RecipeError
from isogrid.files import write_whole
from isogrid.planning.plan import Plan
from isogrid.recipes.data import Batches, Data, collate, mixed_seed, size
from isogrid.recipes.kept import kept_weights
from isogrid.recipes.loop import Objective, fit, float_groups, on_device, seed_everything
from isogrid.recipes.progress import Pace, Progress
from isogrid.recipes.schema import Optimization, Recipe, Training
from isogrid.recipes.sources import AT_RANDOM, make_model
from isogrid.training import Schedule
from isogrid.training.blocks import find_blocks
from isogrid.training.optimizers import make_optimizer as optimizer_of

if TYPE_CHECKING:
    from accelerate import Accelerator


def begins_untrained(recipe: Recipe) -> bool:
    """Whether quantisation begins with a model that knows nothing yet."""
    is_trained = recipe.float_training is not None or recipe.checkpoint is not None
    return not is_trained and recipe.model.name in AT_RANDOM


def float_model(recipe: Recipe, data: Data, accelerator: "Accelerator", progress: Progress) -> nn.Module:
    """The float model of a recipe: made, and loaded or trained as the recipe says.

    Raises:
        RecipeError: the model cannot be made, or its checkpoint does not fit.
    """
    model = new_model(recipe)
    if recipe.checkpoint is not None:
        load_float_weights(model, Path(recipe.checkpoint))
    elif recipe.float_training is not None:
        _trained_or_kept(recipe, recipe.float_training, model, data, accelerator, progress)
    # What follows is the same, whether the model was trained just now or not.
    seed_everything(mixed_seed(recipe.training.seed, 0))
    return model.eval()


def _trained_or_kept(
    recipe: Recipe, settings: Optimization, model: nn.Module, data: Data, accelerator: "Accelerator", progress: Progress
) -> None:
    """Train the float model in place; a built-in one is taken from where another demo has left it."""
    file = kept_weights(recipe, settings, model, data, accelerator)
    if file is not None and file.is_file():
        load_float_weights(model, file)
        progress.message(f"An earlier run has trained this float model: {file}. Delete it to train it again.")
        return
    train_float(model, data, settings, accelerator, progress, "training the float model")
    if file is not None and accelerator.is_main_process:
        save_float_weights(model, file)


def new_model(recipe: Recipe) -> nn.Module:
    """The model of a recipe with the random weights of the recipe's seed."""
    seed_everything(recipe.training.seed)
    return make_model(recipe.model)


def model_with(recipe: Recipe, weights: Path) -> nn.Module:
    """The model of a recipe with the float weights of a file, such as those that a run began with."""
    model = new_model(recipe)
    load_float_weights(model, weights)
    return model


def load_float_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a model; raises RecipeError where the two do not fit."""
    try:
        missing, unexpected = load_model(model, path, strict=False)
    except FileNotFoundError as error:
        raise RecipeError(f"checkpoint: there is no file {path}.") from error
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"checkpoint: {path} is not a readable safetensors file: {error}.") from error
    except RuntimeError as error:
        raise RecipeError(f"checkpoint: {path} does not fit the model: {error}") from error
    if missing or unexpected:
        raise RecipeError(
            f"checkpoint: {path} does not fit the model. Missing: {', '.join(missing) or 'nothing'}. "
            f"Unknown: {', '.join(unexpected) or 'nothing'}."
        )


def save_float_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights to a safetensors file, from the CPU; a tied weight once."""
    model.cpu()
    write_whole(path, lambda temporary: save_model(model, str(temporary)))


def train_float(
    model: nn.Module,
    data: Data,
    settings: Optimization,
    accelerator: "Accelerator",
    progress: Progress,
    title: str,
) -> nn.Module:
    """Train a float model in place."""
    steps = settings.total_steps(size(data.train))
    optimizer = optimizer_of(settings.optimizer, float_groups(model, settings))
    data.check(model)
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    pace = Pace(data, settings.batch_size)
    with progress.task(title, steps) as advance:
        return fit(
            model, optimizer, data, settings, steps, accelerator,
            after_step=lambda step, loss: advance(f"loss {float(loss):.4f}{pace.step()}"),
        )  # fmt: skip


def plan_of(recipe: Recipe, model: nn.Module, data: Data) -> Plan:
    """The plan of a recipe's model."""
    rules = [rule.rule() for rule in recipe.rules]
    return plan(model, recipe.runtime, recipe.scheme, rules, example_inputs=data.example_inputs)


def prepared_model(recipe: Recipe, model: nn.Module, data: Data, accelerator: "Accelerator") -> nn.Module:
    """Plan, prepare and calibrate a float model by a recipe, in place: the model after post-training quantisation."""
    model.cpu()
    data.check(model)
    prepare(model, plan_of(recipe, model, data)).to(accelerator.device)
    return calibrate(model, (on_device(batch, accelerator.device) for batch in calibration_batches(recipe, data)))


def adapt(recipe: Recipe, model: nn.Module, progress: Progress) -> None:
    """Give a prepared model the adapters of a recipe, if it has any, and say what becomes of them."""
    if recipe.adapters is not None:
        report = add_adapters(model, **recipe.adapters.model_dump())
        later = "" if report.merges_exactly else " This run does so on its test data, after training."
        progress.message(f"{report}{later}")


def by_blocks(
    recipe: Recipe, model: nn.Module, data: Data, folder: Path, accelerator: "Accelerator", progress: Progress
) -> None:
    """Train a prepared model block by block as a recipe says, and leave it with scales to train over codes.

    Raises:
        RecipeError: there are several processes.
    """
    if recipe.blockwise is None:
        return
    if accelerator.num_processes > 1:
        raise RecipeError("blockwise: blocks are trained in one process. Start the run without torchrun.")
    entry = recipe.blockwise
    settings = Blockwise(
        epochs=entry.epochs, lr=entry.lr, scale_lr=entry.scale_lr, optimizer=entry.optimizer, seed=recipe.training.seed
    )
    order = Batches(size(data.train), entry.batch_size, recipe.training.seed)
    count = max(1, min(entry.examples // entry.batch_size, order.per_epoch))
    batches = [on_device(collate(data.train, order[index]), accelerator.device) for index in range(count)]
    steps = len(find_blocks(model, entry.match)) * entry.epochs * count
    with progress.task("training block by block", steps) as advance:
        train_blockwise(
            model, batches, settings, blocks=entry.match, folder=folder,
            after_step=lambda path, step, loss: advance(f"{path} error {loss:.3g}"),
        )  # fmt: skip
    _say_left(freeze_codes(model), progress)


def freeze(recipe: Recipe, model: nn.Module, progress: Progress) -> None:
    """Keep the part of a prepared model that a recipe freezes as codes, and say what keeps float weights."""
    if recipe.freeze is not None:
        entry = recipe.freeze
        _say_left(freeze_codes(model, entry.match, exclude=entry.exclude, scales=entry.scales), progress)


def _say_left(left: dict[str, str], progress: Progress) -> None:
    if left:
        progress.message(f"These keep float weights, frozen: {', '.join(f'{p} ({why})' for p, why in left.items())}.")


def calibration_batches(recipe: Recipe, data: Data) -> Iterator[tuple[Any, ...]]:
    """The first batches of the shuffled training data."""
    batches = Batches(size(data.train), recipe.calibration.batch_size, recipe.training.seed)
    for index in range(min(recipe.calibration.batches, batches.per_epoch)):
        yield collate(data.train, batches[index])


def make_optimizer(model: nn.Module, settings: Training, others: Sequence[dict[str, Any]] = ()) -> Optimizer:
    """The optimizer of a prepared model, and of other groups of parameters."""
    groups = parameter_groups(
        model,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        scale_lr=settings.scale_lr,
        relative_scale_lr=settings.optimizer != "sgd",
    )
    return optimizer_of(settings.optimizer, [*groups, *others])


def make_schedule(model: nn.Module, recipe: Recipe, steps: int) -> Schedule:
    """The schedule of a recipe, at the position that the model is at."""
    return Schedule(model, total_steps=steps, **recipe.schedule.model_dump())


def train_quantized(
    recipe: Recipe,
    model: nn.Module,
    data: Data,
    accelerator: "Accelerator",
    progress: Progress,
    title: str,
    *,
    optimizer: Optimizer | None = None,
    objective: Objective | None = None,
    companion: nn.Module | None = None,
    start: int = 0,
    after_step: Callable[[int, torch.Tensor], None] = lambda step, loss: None,
) -> nn.Module:
    """Quantization-aware training of a prepared model, in place."""
    steps = recipe.training.total_steps(size(data.train))
    schedule = make_schedule(model, recipe, steps)
    optimizer = make_optimizer(model, recipe.training) if optimizer is None else optimizer
    if recipe.training.activation_checkpointing:
        checkpoint_activations(model)
    pace = Pace(data, recipe.training.batch_size)
    with progress.task(title, steps, start) as advance:

        def step_done(step: int, loss: torch.Tensor) -> None:
            advance(f"loss {float(loss):.4f}{pace.step()}")
            after_step(step, loss)

        return fit(
            model, optimizer, data, recipe.training, steps, accelerator,
            schedule=schedule, objective=objective, companion=companion, start=start, after_step=step_done,
        )  # fmt: skip
