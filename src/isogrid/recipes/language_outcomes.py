"""What a language model achieves once it is exported: perplexity in its runtime, agreement, size, speed."""

import time
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from isogrid.api import export, load, verify
from isogrid.recipes.language import LanguageData
from isogrid.recipes.outcomes import Outcome
from isogrid.recipes.perplexity import Predictions, predictions
from isogrid.report import LanguageFigures, ModelReport, ResultRow, model_report
from isogrid.targets import Artifact, LoadedModel

VERIFIED = 2
"""Sequences that every operation is replayed on; the whole text goes through the runtime besides."""


@runtime_checkable
class Writes(Protocol):
    """A loaded language model that can also write one token after the other, as a chat does."""

    def decoding_speed(self, input_ids: Tensor) -> float:
        """Tokens a second in which it takes up input_ids int64 [1, length] one by one."""
        ...


def float_outcome(
    name: str, method: Literal["float", "float-extra"], model: nn.Module, data: LanguageData, path: Path
) -> Outcome:
    """Run a float model on the test data in PyTorch; the size is that of its weights."""
    found = predictions(model.cpu().eval(), data.test_batches())
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    row = ResultRow(name, method, found.accuracy, size_bytes=size, language=_figures(found))
    return Outcome(row, ModelReport(name, method))


def quantized_outcome(
    name: str, method: Literal["ptq", "qat"], model: nn.Module, data: LanguageData, path: Path
) -> Outcome:
    """Export a prepared model, verify it, and run it on the test data in PyTorch and in its runtime."""
    model.cpu().eval()
    artifact = export(with_tokenizer(model, data), path)
    verification = verify(
        model, artifact, islice(data.test_batches(VERIFIED), 1), lambda outputs, batch: data.metric(outputs, batch[-1])
    )
    row = deployed_row(name, method, artifact, predictions(model, data.test_batches()), data)
    return Outcome(row, model_report(name, method, model, verification), artifact, verification)


def deployed_row(
    name: str, method: Literal["float", "float-extra", "ptq", "qat"], artifact: Artifact, trained: Predictions,
    data: LanguageData,
) -> ResultRow:  # fmt: skip
    """Run an artefact on the test data in its runtime.

    Args:
        name, method: of the row.
        artifact: what was exported.
        trained: what the forward that was trained says about the test data.
        data: of the model.
    """
    loaded = load(artifact.path)
    found, speed = _timed(loaded, data)
    ids = next(iter(data.test_batches(1)))[0]
    return ResultRow(
        name,
        method,
        found.accuracy,
        size_bytes=artifact.size_bytes,
        artifact=str(artifact.path),
        language=_figures(
            found,
            trained_perplexity=trained.perplexity.value,
            agreement=found.agreement(trained),
            prompt_speed=speed,
            decoding_speed=loaded.decoding_speed(ids) if isinstance(loaded, Writes) else None,
        ),
    )


def with_tokenizer(model: nn.Module, data: LanguageData) -> nn.Module:
    """The model with its data's tokenizer as an attribute, for artefacts that hold one."""
    model.tokenizer = data.tokenizer
    return model


def _timed(loaded: LoadedModel, data: LanguageData) -> tuple[Predictions, float]:
    """A runtime's predictions, and how many tokens of the text it read a second."""
    seconds = 0.0

    def run(input_ids: Tensor) -> Any:
        nonlocal seconds
        start = time.perf_counter()
        outputs = loaded(input_ids)
        seconds += time.perf_counter() - start
        return outputs

    found = predictions(run, data.test_batches())
    return found, found.losses.numel() / max(seconds, 1e-9)


def _figures(found: Predictions, **more: float | None) -> LanguageFigures:
    perplexity = found.perplexity
    return LanguageFigures(perplexity.value, perplexity.low, perplexity.high, perplexity.tokens, **more)
