"""The subject `language` of methods.py: the small language model of the demos, on the English that Python carries."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.recipes.data import Batches, collate, size
from isogrid.recipes.language import LanguageData
from isogrid.recipes.loading import load_recipe
from isogrid.recipes.loop import make_accelerator
from isogrid.recipes.perplexity import predictions, token_loss
from isogrid.recipes.progress import Silent
from isogrid.recipes.sources import make_data
from isogrid.recipes.stages import float_model, load_float_weights, new_model, save_float_weights

BATCH = 4


class LanguageModel:
    """Judged on held-out text: perplexity, and how often the most probable token is the float model's.

    Args:
        folder: holds the float model, or gets it: trained as the demo of the recipe `llama-q4_0` trains it.
        held_out: batches of eight sequences to judge on.
    """

    columns: ClassVar[tuple[str, ...]] = ("perplexity [95 %]", "agreement with float")
    schemes: ClassVar[tuple[tuple[str, str], ...]] = (
        ("vllm", "w8a8"),
        ("onnxruntime", "w4a8"),
        ("vllm", "w4a16"),
        ("vllm", "nvfp4a16"),
        ("vllm", "w2a16-asym"),
    )
    task: ClassVar[str] = "cross-entropy"
    blocks: ClassVar[str] = "model.layers.*"
    rates: ClassVar[dict[str, float]] = {"qat": 3e-4, "qad": 1e-4, "adapters": 1e-3, "blocks": 3e-4}

    def __init__(self, folder: Path, held_out: int = 4):
        self.recipe = load_recipe("llama-q4_0", [], demo=True)
        data = make_data(self.recipe.data)
        if not isinstance(data, LanguageData):
            raise TypeError("The recipe's data is no text.")
        self.data, self.path = data, folder / "float.safetensors"
        if not self.path.is_file():
            save_float_weights(float_model(self.recipe, data, make_accelerator(self.recipe), Silent()), self.path)
        self.test = list(islice(data.test_batches(), held_out))
        self.teacher = self.float_model()
        self.expected = predictions(self.teacher, self.test)

    def float_model(self) -> nn.Module:
        model = new_model(self.recipe)
        load_float_weights(model, self.path)
        config: Any = model.config
        config.use_cache = False
        return model.eval()

    def batches(self, steps: int) -> Iterator[dict[str, Tensor]]:
        order = Batches(size(self.data.train), BATCH, 0)
        for step in range(steps):
            ids, targets = collate(self.data.train, order[step % order.per_epoch])
            yield {"input_ids": ids, "targets": targets}

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"input_ids": batch["input_ids"]}

    def task_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return token_loss(model(batch["input_ids"]), batch["targets"])

    def distillation_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted: Any = self.teacher(batch["input_ids"])
        return ig.Distillation()(model(batch["input_ids"]), wanted)

    def figures(self, model: nn.Module) -> tuple[str, ...]:
        found = predictions(model, self.test)
        return str(found.perplexity), f"{100 * found.agreement(self.expected):.2f} %"

    def held_out_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.test[0][0]}
