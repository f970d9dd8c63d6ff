"""The whole flow on handwritten digits: float, then four schemes by post-training quantisation and by training."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from isogrid.api import save
from isogrid.recipes.data import Data
from isogrid.recipes.folders import RunFolder
from isogrid.recipes.loading import load_recipe
from isogrid.recipes.loop import make_accelerator
from isogrid.recipes.outcomes import Outcome, float_outcome, quantized_outcome, with_latencies, write_outcomes
from isogrid.recipes.progress import Progress, Silent
from isogrid.recipes.schema import Optimization, Recipe
from isogrid.recipes.sources import make_data
from isogrid.recipes.stages import float_model, prepared_model, train_float, train_quantized
from isogrid.report import ResultRow

RECIPES = ("digits-w8a8", "digits-w4a8", "digits-w2a8", "digits-ternary-a8")


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart found.

    Attributes:
        rows: float, float with the same extra training, then PTQ and QAT of each scheme.
        failures: bounds of the verification that do not hold, each with its model.
    """

    rows: tuple[ResultRow, ...]
    failures: tuple[str, ...]


def quickstart(folder: str | Path, seed: int = 0, progress: Progress | None = None) -> QuickstartResult:
    """Train, quantise, export and verify; writes the models, `result.json` and `report.html`.

    Each model gets a folder like that of a run, so that `isogrid verify`, `export` and `inspect` work on it.

    Args:
        folder: made if missing.
        seed: of everything random.
        progress: who is told.
    """
    with _one_thread():
        return _quickstart(Path(folder), seed, progress or Silent())


def _quickstart(folder: Path, seed: int, progress: Progress) -> QuickstartResult:
    recipes = [load_recipe(name, [f"training.seed={seed}", f"float_training.seed={seed}"]) for name in RECIPES]
    data, accelerator = make_data(recipes[0].data), make_accelerator(recipes[0])
    outcomes: list[Outcome] = []
    with progress.task("models", 2 + 2 * len(recipes)) as advance:

        def exported(outcome: Outcome) -> None:
            outcomes.append(outcome)
            advance(f"{outcome.row.name} {outcome.row.method}: {outcome.row.accuracy:.2%}")

        reference = float_model(recipes[0], data, accelerator, progress)
        exported(_float(reference, "float", data, folder))
        longer = copy.deepcopy(reference)
        train_float(longer, data, _extra_training(recipes[0]), accelerator, progress, "training float some more")
        exported(_float(longer, "float-extra", data, folder))
        for recipe in recipes:
            model = prepared_model(recipe, copy.deepcopy(reference), data, accelerator)
            exported(_quantized(recipe, model, "ptq", data, folder))
            train_quantized(recipe, model, data, accelerator, progress, f"training {recipe.scheme}")
            exported(_quantized(recipe, model, "qat", data, folder))
    with progress.task("measuring latency", 1) as advance:
        outcomes = with_latencies(outcomes)
        advance("")
    write_outcomes(
        outcomes,
        folder,
        title="Handwritten digits",
        subtitle="A small residual network, float and quantised. Every figure is from ONNX Runtime on the test split.",
    )
    failures = [
        f"{outcome.row.name} {outcome.row.method}: {line}"
        for outcome in outcomes
        if outcome.verification is not None
        for line in outcome.verification.failures
    ]
    return QuickstartResult(tuple(outcome.row for outcome in outcomes), tuple(failures))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The network is so small that threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _extra_training(recipe: Recipe) -> Optimization:
    """As many steps as quantization-aware training takes, at its learning rate: the honest control."""
    return Optimization(**recipe.training.model_dump(include=set(Optimization.model_fields)))


def _float(model: nn.Module, method: Literal["float", "float-extra"], data: Data, folder: Path) -> Outcome:
    return float_outcome("float", method, model, data, RunFolder(folder / method).artifact)


def _quantized(recipe: Recipe, model: nn.Module, method: Literal["ptq", "qat"], data: Data, folder: Path) -> Outcome:
    run = RunFolder(folder / f"{recipe.scheme}-{method}")
    run.save_recipe(recipe)
    save(model, run.checkpoint)
    return quantized_outcome(recipe.scheme.upper(), method, model, data, run.artifact)
