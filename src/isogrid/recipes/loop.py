"""The training loop of recipes, on Accelerate: one process or many, on CPU or GPU."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from isogrid.errors import RecipeError
from isogrid.recipes.data import Batches, Data, mixed_seed, size
from isogrid.recipes.schema import Optimization, Recipe
from isogrid.training import Schedule, TwoStages
from isogrid.training.memory import explained_memory
from isogrid.training.optimizers import set_rate

if TYPE_CHECKING:
    from accelerate import Accelerator

AfterStep = Callable[[int, Tensor], None]
"""Called with the number of steps done and the loss of the last one, float32 []."""

LESS_MEMORY = (
    "Set training.activation_checkpointing to true, raise training.accumulation, use the optimizer adamw8bit, or "
    "shorter sequences; then go on with --resume. The last checkpoint is whole."
)

Objective = Callable[[nn.Module, list[Any], Any], Tensor]
"""Called with the model as it is trained, the inputs of a batch and its target; gives the loss, a scalar."""


def make_accelerator(recipe: Recipe) -> "Accelerator":
    """Accelerate, set up for a run; under torchrun or accelerate launch it joins the other processes."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    settings, schedule = recipe.training, recipe.schedule
    # A phase that leaves quantisers off leaves their scales without a gradient.
    partial = bool(schedule.float_steps or schedule.observe_steps or schedule.weight_only_steps)
    return Accelerator(
        # Without this, processes on CPUs alone would not know of each other.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if settings.precision == "bfloat16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.accumulation, sync_with_dataloader=False
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=partial)],
        log_with=_trackers(settings.trackers),
        project_dir=recipe.output,
    )


def _trackers(names: Sequence[str]) -> list[str] | None:
    """Trackers by their names; raises RecipeError for one that Accelerate does not know or that is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    for name in names:
        if name not in installed:
            known = name in LOGGER_TYPE_TO_CLASS
            raise RecipeError(
                f"training.trackers: {name!r} {'is not installed' if known else 'is no tracker of Accelerate'}. "
                f"Installed: {', '.join(installed)}. All: {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}."
            )
    return list(names) or None


def with_trackers(recipe: Recipe, accelerator: "Accelerator") -> None:
    """Begin a run at every tracker that the recipe names."""
    if recipe.training.trackers:
        described = {"model": recipe.model.name, "scheme": recipe.scheme, "recipe": recipe.model_dump_json()}
        accelerator.init_trackers("isogrid", config=described)


def float_groups(model: nn.Module, settings: Optimization) -> list[dict[str, Any]]:
    """Parameter groups of a float model: weights with decay, biases and norms without."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": weights, "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": others, "lr": settings.lr, "weight_decay": 0.0},
    ]


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    data: Data,
    settings: Optimization,
    steps: int,
    accelerator: "Accelerator",
    *,
    schedule: Schedule | None = None,
    objective: Objective | None = None,
    companion: nn.Module | None = None,
    start: int = 0,
    after_step: AfterStep = lambda step, loss: None,
) -> nn.Module:
    """Train in place, from one step to another.

    Everything random is known from the seed and the step's number, so that a run which starts in the middle sees
    the batches and the random numbers of one that came there by itself.

    Args:
        model: float or prepared.
        optimizer: of the model's parameters; of `isogrid.training.optimizers`.
        data: its training data are used.
        settings: batch size, decay and the like.
        steps: optimizer steps of the whole run.
        accelerator: of `make_accelerator`.
        schedule: of a prepared model.
        objective: what gives the loss of a batch; the data's own loss where not given.
        companion: another model that the optimizer trains, in one process; the norm of its gradient is its own.
        start: steps that are done already.
        after_step: called after each step.

    Returns:
        The model, in evaluation mode.

    Raises:
        RecipeError: a batch cannot be divided among the processes.
        MemoryExhaustedError: a step does not fit into memory.
    """
    loader = _loader(data.train, settings, start, steps, accelerator)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    objective = objective or (lambda trained, inputs, target: data.loss(trained(*inputs), target))
    stages = None if settings.two_stages is None else TwoStages(**settings.two_stages.model_dump())
    trained, accelerated = accelerator.prepare(model, optimizer)
    trained.train()
    for step in range(start, steps):
        factor = learning_rate_factor(step, steps, settings.warmup_steps, settings.decay)
        for group in optimizer.param_groups:
            set_rate(group, group["initial_lr"] * factor)
        if stages is not None:
            stages.apply(optimizer, step, steps)
        total = torch.zeros((), device=accelerator.device)
        for part in range(settings.accumulation):
            *inputs, target = on_device(next(loader), accelerator.device)
            seed_everything(mixed_seed(settings.seed, step, part, accelerator.process_index))
            memory = explained_memory(f"Step {step + 1}", LESS_MEMORY, model.parameters())
            with memory, accelerator.accumulate(trained):
                with accelerator.autocast():
                    loss = objective(trained, inputs, target)
                accelerator.backward(loss)
                if settings.clip_norm is not None and accelerator.sync_gradients:
                    for network in (trained,) if companion is None else (trained, companion):
                        accelerator.clip_grad_norm_(network.parameters(), settings.clip_norm)
                accelerated.step()
                accelerated.zero_grad()
            total += loss.detach().float() / settings.accumulation
        if schedule is not None:
            schedule.step()
        after_step(step + 1, accelerator.reduce(total, reduction="mean"))
    accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return model.eval()


def learning_rate_factor(step: int, total: int, warmup: int = 0, decay: str = "cosine") -> float:
    """By what the learning rate is multiplied at a step: a linear warm-up, then a decay to nearly nothing, or none.

    Args:
        step: from 0.
        total: steps of the run.
        warmup: steps until the full rate.
        decay: `cosine`, `linear` or `constant`.

    >>> [learning_rate_factor(step, 4, warmup=2, decay="linear") for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return (step + 1) / warmup
    if decay == "constant":
        return 1.0
    share = (step - warmup) / (total - warmup)
    return 1.0 - share if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class SeededDataset(Dataset[Any]):
    """A dataset whose random transforms depend on the seed and the batch alone, not on what was loaded before."""

    def __init__(self, dataset: Dataset[Any], seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, indices: list[int]) -> list[Any]:
        seed_everything(mixed_seed(self.seed, *indices))
        return [self.dataset[index] for index in indices]


def _loader(
    dataset: Dataset[Any], settings: Optimization, start: int, stop: int, accelerator: "Accelerator"
) -> Iterator[Any]:
    """This process's parts of the batches of these steps."""
    batches = Batches(size(dataset), settings.batch_size, settings.seed)
    parts = settings.accumulation * accelerator.num_processes
    share, rest = divmod(batches.batch_size, parts)
    if rest:
        raise RecipeError(
            f"A batch of {batches.batch_size} examples cannot be divided into {parts} parts "
            f"({accelerator.num_processes} processes, accumulation {settings.accumulation}). Use a multiple of {parts}."
        )

    def indices() -> Iterator[list[int]]:
        for step in range(start, stop):
            batch = batches[step]
            for part in range(accelerator.process_index, parts, accelerator.num_processes):
                yield batch[part * share : (part + 1) * share]

    loader: DataLoader[Any] = DataLoader(
        SeededDataset(dataset, settings.seed),
        batch_sampler=indices(),
        num_workers=settings.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)
