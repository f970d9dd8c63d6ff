"""The folder of a run: what lies where, and how to come back to it."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from isogrid.api import restore
from isogrid.errors import CheckpointError
from isogrid.files import write_json
from isogrid.recipes.loading import load_recipe
from isogrid.recipes.schema import Recipe
from isogrid.recipes.stages import new_model
from isogrid.recipes.tokens import pretrained_tokenizer
from isogrid.training.checkpoint import MANIFEST

SUFFIXES = {
    **{"executorch": ".pte", "litert": ".tflite", "llamacpp": ".gguf", "torch-export": ".pt2"},
    **dict.fromkeys(("bitsandbytes", "vllm"), ""),  # folders
}
"""Of the files of targets that do not take ONNX; a folder has none."""


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are.

    >>> RunFolder(Path("runs/digits-w4a8")).artifact("onnxruntime").as_posix()
    'runs/digits-w4a8/model.onnx'
    """

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe with all its defaults, as JSON."""
        return self.path / "recipe.json"

    @property
    def float_weights(self) -> Path:
        """The float model, as safetensors."""
        return self.path / "float.safetensors"

    @property
    def tokenizer(self) -> Path:
        """Folder of a language model's tokenizer."""
        return self.path / "tokenizer"

    @property
    def checkpoint(self) -> Path:
        """Folder of the last checkpoint."""
        return self.path / "checkpoint"

    @property
    def blocks(self) -> Path:
        """Folder of the block-wise stage: what is trained of it, and where it is."""
        return self.path / "blocks"

    @property
    def generated(self) -> Path:
        """Sequences that the float model wrote, as safetensors."""
        return self.path / "generated.safetensors"

    @property
    def tensorboard(self) -> Path:
        """Folder of event files."""
        return self.path / "tensorboard"

    def artifact(self, target: str) -> Path:
        """The model as exported for a target."""
        return self.path / f"model{SUFFIXES.get(target, '.onnx')}"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint."""
        return (self.checkpoint / MANIFEST).is_file()

    def save_recipe(self, recipe: Recipe) -> None:
        """Write the recipe of this run."""
        write_json(self.recipe, recipe.model_dump())

    def saved_recipe(self) -> Recipe:
        """The recipe of this run; raises CheckpointError where it cannot be read."""
        try:
            return Recipe.model_validate(json.loads(self.recipe.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path} is no folder of a run: it has no {self.recipe.name}.") from error
        except (OSError, ValidationError, ValueError) as error:
            raise CheckpointError(f"{self.recipe} cannot be read: {error}") from error

    def trained_model(self) -> nn.Module:
        """The prepared model as the last checkpoint has it, in evaluation mode."""
        model = restore(new_model(self.saved_recipe()), self.checkpoint).eval()
        if self.tokenizer.is_dir():  # artefacts of language models hold it
            model.tokenizer = pretrained_tokenizer(str(self.tokenizer))
        return model


def find_run(source: str) -> RunFolder:
    """The folder of a run that has a checkpoint.

    Args:
        source: that folder, the checkpoint in it, or the recipe that it came from, by path or packaged name.

    Raises:
        CheckpointError: there is no run, or it has no checkpoint yet.
        RecipeError: the source is no folder, and no recipe either.
    """
    path = Path(source)
    if path.is_dir():
        folder = RunFolder(path)
        if not folder.recipe.is_file() and RunFolder(path.parent).recipe.is_file():
            folder = RunFolder(path.parent)
    else:
        folder = RunFolder(Path(load_recipe(source).output or "."))
        if not folder.has_checkpoint:
            raise CheckpointError(f"{source} has not been trained in {folder.path} yet. Run: isogrid run {source}")
    folder.saved_recipe()
    if not folder.has_checkpoint:
        raise CheckpointError(f"{folder.path} has no checkpoint yet.")
    return folder
