"""What a run will take, said before it starts."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from isogrid.recipes.data import Data, collate, size
from isogrid.recipes.loop import LESS_MEMORY, on_device
from isogrid.recipes.schema import Recipe
from isogrid.training.estimating import Estimate, estimate
from isogrid.training.memory import explained_memory

if TYPE_CHECKING:
    from accelerate import Accelerator


def estimated(recipe: Recipe, model: nn.Module, data: Data, accelerator: "Accelerator") -> Estimate:
    """The estimate of a recipe's training, by the loss of its data; a teacher's share is not in it.

    Args:
        recipe: of the run.
        model: as it will train.
        data: whose first examples are looked at.
        accelerator: of the run.

    Raises:
        PlanError: nothing trains.
        MemoryExhaustedError: half of a batch does not fit into memory.
    """
    settings = recipe.training
    at_once = settings.batch_size // (settings.accumulation * accelerator.num_processes)

    def loss(count: int) -> Tensor:
        *inputs, target = on_device(collate(data.train, range(min(count, size(data.train)))), accelerator.device)
        with accelerator.autocast():
            return data.loss(model(*inputs), target)

    model.train()
    try:
        steps = settings.total_steps(size(data.train))
        device = accelerator.device if accelerator.device.type == "cuda" else None
        with explained_memory("A look at the first examples", LESS_MEMORY, model.parameters()):
            return estimate(
                model, loss, max(1, at_once), steps, settings.optimizer, device, settings.accumulation
            )
    finally:
        model.eval()
