"""Float models that demos begin with: trained once, and kept."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from isogrid.recipes.data import Data
from isogrid.recipes.language import LanguageData
from isogrid.recipes.schema import Optimization, Recipe
from isogrid.recipes.tokens import in_cache, tokenizer_digest

if TYPE_CHECKING:
    from accelerate import Accelerator


def kept_weights(
    recipe: Recipe, settings: Optimization, model: nn.Module, data: Data, accelerator: "Accelerator"
) -> Path | None:
    """Where the weights of a built-in language model on the built-in text are kept; None for all other models.

    Its name depends on all that they come from. Code and data of others could change unseen, so nothing of theirs is
    kept.

    Args:
        recipe: of the run.
        settings: how the float model is trained.
        model: with the random weights of the recipe's seed.
        data: of the recipe.
        accelerator: of the run.
    """
    if not isinstance(data, LanguageData) or (recipe.model.name, recipe.data.name) != ("language-model", "english"):
        return None
    parts = [
        recipe.model.model_dump_json(),
        settings.model_dump_json(exclude={"workers"}),
        f"seed {recipe.training.seed}, {accelerator.num_processes} processes on {accelerator.device.type}",
        data.description,
        tokenizer_digest(data.tokenizer),
        str([(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]),
        str(data.length),
        *(version(package) for package in ("torch", "transformers")),
    ]
    return in_cache("models", "language-model-{}.safetensors", *parts)
