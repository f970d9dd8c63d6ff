"""Data that the float model writes itself, in place of those it does not have."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import TensorDataset

from isogrid.errors import RecipeError
from isogrid.files import digest, write_whole
from isogrid.recipes.data import Data
from isogrid.recipes.folders import RunFolder
from isogrid.recipes.language import LanguageData
from isogrid.recipes.progress import Progress
from isogrid.recipes.schema import Recipe
from isogrid.recipes.stages import model_with
from isogrid.training import generate_text

if TYPE_CHECKING:
    from accelerate import Accelerator


def with_generated(
    recipe: Recipe, data: Data, folder: RunFolder, accelerator: "Accelerator", progress: Progress
) -> Data:
    """The data of a run whose recipe lets the float model write what is learned; else the data as they are.

    The sequences are kept in the run's folder, with a digest of what they come from: a run that goes on reads them.
    Test data stay those of the recipe.

    Args:
        recipe: of the run.
        data: of the recipe; of a language model.
        folder: with the float weights.
        accelerator: of the run.
        progress: who is told.

    Raises:
        RecipeError: the data are no text.
        DistillationError: the model's logits are no distribution.
    """
    entry = None if recipe.distillation is None else recipe.distillation.generate
    if entry is None:
        return data
    if not isinstance(data, LanguageData):
        raise RecipeError("distillation.generate: only language models write text. Leave it out, or name data of text.")
    accelerator.wait_for_everyone()  # the first process writes the float weights
    source = f"{digest(folder.float_weights)} {entry.sequences} {entry.batch_size} {data.length} {recipe.training.seed}"
    if accelerator.is_main_process and _kept(folder.generated, source) is None:
        model = model_with(recipe, folder.float_weights).to(accelerator.device)
        with progress.task("the float model writes", 1) as advance:
            written = generate_text(
                model, entry.sequences, data.length + 1,
                vocabulary=len(data.tokenizer), batch_size=entry.batch_size, seed=recipe.training.seed,
            ).cpu()  # fmt: skip
            write_whole(folder.generated, lambda path: save_file({"tokens": written}, path, {"source": source}))
            advance(f"{entry.sequences} sequences of {data.length} tokens")
    accelerator.wait_for_everyone()
    tokens = _kept(folder.generated, source)
    if tokens is None:
        raise RecipeError(f"{folder.generated} cannot be read by every process. Put the run's folder where all see it.")
    return replace(data, train=TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))


def _kept(path: Path, source: str) -> Tensor | None:
    """int64 [sequences, length], where they are there and come from this."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("tokens") if file.metadata() == {"source": source} else None
    except (OSError, SafetensorError):
        return None
