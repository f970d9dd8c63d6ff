"""The end of a run: the models in their runtime, in one table and on one page."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from isogrid.api import VerificationReport, adapter_report, merge_adapters, merge_difference
from isogrid.recipes import language_outcomes, outcomes
from isogrid.recipes.data import Data, size
from isogrid.recipes.folders import RunFolder
from isogrid.recipes.language import LanguageData
from isogrid.recipes.outcomes import Outcome, with_latencies, write_outcomes
from isogrid.recipes.perplexity import Predictions, predictions
from isogrid.recipes.progress import Progress
from isogrid.recipes.schema import Optimization, Recipe
from isogrid.recipes.stages import begins_untrained, model_with, prepared_model, train_float
from isogrid.report import ResultRow

if TYPE_CHECKING:
    from accelerate import Accelerator

MERGE_BATCHES = 4
"""Batches of test data on which the merged model is compared with the trained one."""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind; on all but the first process there are no rows.

    Attributes:
        rows: float, and quantised after training; with `controls`, also float with as many more steps, and PTQ.
        verification: of the artefact.
        folder: with everything in it.
    """

    rows: tuple[ResultRow, ...]
    verification: VerificationReport | None
    folder: Path


def finish(
    recipe: Recipe, model: nn.Module, data: Data, folder: RunFolder, accelerator: "Accelerator", progress: Progress
) -> RunResult:
    """Export and verify what a run has trained, measure it beside the float model, and write the report."""
    trained = _merge(recipe, model, data, progress)
    end = _End(recipe, data, folder, accelerator, progress)
    jobs: list[Callable[[], Outcome]] = [end.float, lambda: end.quantized("qat", model, trained)]
    if recipe.controls:
        jobs = [end.float, end.longer, end.ptq, jobs[-1]]
    found = []
    with progress.task("exporting and verifying", len(jobs)) as advance:
        for job in jobs:
            found.append(job())
            advance(found[-1].row.method)
    is_language = isinstance(data, LanguageData)
    found = found if is_language else with_latencies(found, data)
    write_outcomes(
        found,
        folder.path,
        title=f"{recipe.model.name}, {recipe.scheme}",
        subtitle=f"Trained on {recipe.data.name} for {recipe.runtime}; tested on {size(data.test)} examples.",
        setting=f"{recipe.runtime}, on this machine" if is_language else None,
    )
    return RunResult(tuple(outcome.row for outcome in found), found[-1].verification, folder.path)


def _merge(recipe: Recipe, model: nn.Module, data: Data, progress: Progress) -> Predictions | None:
    """Merge adapters that do not merge by themselves, and say what that changes on test data.

    What a language model said of these before it was merged is what the table calls trained; else None.
    """
    if recipe.adapters is None or adapter_report(model).merges_exactly:
        return None
    batches = islice((inputs for *inputs, _ in data.test_batches()), MERGE_BATCHES)
    progress.message(str(merge_difference(model.cpu().eval(), batches)))
    trained = predictions(model, data.test_batches()) if isinstance(data, LanguageData) else None
    merge_adapters(model)
    return trained


@dataclass(frozen=True)
class _End:
    """Makes the models that a run is judged by."""

    recipe: Recipe
    data: Data
    folder: RunFolder
    accelerator: "Accelerator"
    progress: Progress

    @property
    def _outcomes(self) -> Any:
        """How this kind of data judges: the module with `float_outcome` and `quantized_outcome`."""
        return language_outcomes if isinstance(self.data, LanguageData) else outcomes

    def _float_model(self) -> nn.Module:
        return model_with(self.recipe, self.folder.float_weights)

    def float(self) -> Outcome:
        """The model that quantisation began with."""
        name = "untrained" if begins_untrained(self.recipe) else "float"
        return self._float_outcome("float", self._float_model(), name)

    def longer(self) -> Outcome:
        """That model, trained for as many more steps: what training alone would have brought."""
        settings = Optimization(**self.recipe.training.model_dump(include=set(Optimization.model_fields)))
        model = train_float(
            self._float_model(), self.data, settings, self.accelerator, self.progress, "training float some more"
        )
        return self._float_outcome("float-extra", model)

    def ptq(self) -> Outcome:
        """That model, quantised without training."""
        model = prepared_model(self.recipe, self._float_model(), self.data, self.accelerator)
        return self.quantized("ptq", model)

    def quantized(
        self, method: Literal["ptq", "qat"], model: nn.Module, trained: Predictions | None = None
    ) -> Outcome:
        """A quantised model in its runtime; `trained` is what it said before it was merged, where that changed it."""
        path = self.folder.artifact(self.recipe.runtime)
        if method == "ptq":
            path = path.with_stem(f"{path.stem}-ptq")
        name = self.recipe.scheme.upper()
        if isinstance(self.data, LanguageData):
            return language_outcomes.quantized_outcome(name, method, model, self.data, path, trained)
        return outcomes.quantized_outcome(name, method, model, self.data, path)

    def _float_outcome(
        self, method: Literal["float", "float-extra"], model: nn.Module, name: str = "float"
    ) -> Outcome:
        path = self.folder.artifact(self.recipe.runtime).with_stem(method)
        path = path if path.suffix == ".gguf" else self.folder.path / f"{method}.onnx"
        outcome: Outcome = self._outcomes.float_outcome(name, method, model, self.data, path)
        return outcome
