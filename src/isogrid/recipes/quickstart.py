"""The whole flow on handwritten digits: float, then four schemes by post-training quantisation and by training."""

from collections.abc import Iterator, Sequence
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
from isogrid.recipes.processes import in_processes
from isogrid.recipes.progress import Progress, Silent
from isogrid.recipes.schema import Optimization, Recipe
from isogrid.recipes.sources import make_data
from isogrid.recipes.stages import (
    float_model,
    model_with,
    prepared_model,
    save_float_weights,
    train_float,
    train_quantized,
)
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


def quickstart(
    folder: str | Path, seed: int = 0, progress: Progress | None = None, settings: Sequence[str] = ()
) -> QuickstartResult:
    """Train, quantise, export and verify; writes the models, `result.json` and `report.html`.

    Each model gets a folder like that of a run, so that `isogrid verify`, `export` and `inspect` work on it. The
    schemes are trained in processes of their own: guard the entry of a program with `if __name__ == "__main__"`.

    Args:
        folder: made if missing.
        seed: of everything random.
        progress: who is told.
        settings: further changes to the recipes, as `key.key=value`.
    """
    folder, progress = Path(folder), progress or Silent()
    settings = [f"training.seed={seed}", f"float_training.seed={seed}", *settings]
    recipes = [load_recipe(name, settings) for name in RECIPES]
    data = make_data(recipes[0].data)
    with progress.task("models", 2 + 2 * len(recipes)) as advance:

        def exported(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
            for outcome in outcomes:
                advance(f"{outcome.row.name} {outcome.row.method}: {outcome.row.accuracy:.2%}")
            return outcomes

        floats = exported(_float_outcomes(recipes[0], folder, progress))
        jobs = [(recipe, folder) for recipe in recipes]
        quantized = {n: exported(found) for n, found in in_processes(_quantized_outcomes, jobs, progress)}
    outcomes = [*floats, *(outcome for n in sorted(quantized) for outcome in quantized[n])]
    with progress.task("measuring latency", 1) as advance:
        outcomes = with_latencies(outcomes, data)
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


def _float_outcomes(recipe: Recipe, folder: Path, progress: Progress) -> list[Outcome]:
    """The float model, and the honest control: as many more steps as quantization-aware training takes."""
    data, accelerator = make_data(recipe.data), make_accelerator(recipe)
    extra = Optimization(**recipe.training.model_dump(include=set(Optimization.model_fields)))
    first, second = RunFolder(folder / "float"), RunFolder(folder / "float-extra")
    with _one_thread():
        model = float_model(recipe, data, accelerator, progress)
        save_float_weights(model, first.float_weights)
        reference = float_outcome("float", "float", model, data, first.artifact(recipe.runtime))
        train_float(model, data, extra, accelerator, progress, "training float some more")
        longer = float_outcome("float", "float-extra", model, data, second.artifact(recipe.runtime))
    return [reference, longer]


def _quantized_outcomes(recipe: Recipe, folder: Path, progress: Progress) -> list[Outcome]:
    """The model of one scheme, before training and after it."""
    data, accelerator = make_data(recipe.data), make_accelerator(recipe)
    with _one_thread():
        model = model_with(recipe, RunFolder(folder / "float").float_weights)
        prepared_model(recipe, model, data, accelerator)
        before = _exported(recipe, model, "ptq", data, folder)
        train_quantized(recipe, model, data, accelerator, progress, f"training {recipe.scheme}")
        return [before, _exported(recipe, model, "qat", data, folder)]


def _exported(recipe: Recipe, model: nn.Module, method: Literal["ptq", "qat"], data: Data, folder: Path) -> Outcome:
    run = RunFolder(folder / f"{recipe.scheme}-{method}")
    run.save_recipe(recipe)
    save(model, run.checkpoint)
    return quantized_outcome(recipe.scheme.upper(), method, model, data, run.artifact(recipe.runtime))
