"""What a language model achieves once it is exported: perplexity in its runtime, agreement, size, speed."""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from isogrid.api import export, load, verify
from isogrid.recipes.language import LanguageData
from isogrid.recipes.outcomes import Outcome
from isogrid.recipes.perplexity import Predictions, predictions
from isogrid.report import LanguageFigures, ModelReport, ResultRow, model_report

VERIFIED = 2
"""Sequences that every operation is replayed on; the whole text goes through the runtime besides."""


class Speed(Protocol):
    """Tokens a second."""

    prompt: float
    decoding: float


@runtime_checkable
class Paced(Protocol):
    """A loaded language model that says how fast it is."""

    def tokens_per_second(self, input_ids: Tensor) -> Speed:
        """Reading input_ids int64 [1, length], and writing one token after the other behind them."""
        ...


def float_outcome(
    name: str, method: Literal["float", "float-extra"], model: nn.Module, data: LanguageData, path: Path
) -> Outcome:
    """Run a float model on the test data.

    Args:
        name, method: of the row.
        model: float.
        data: with the text.
        path: of a GGUF file, which is written in float16 and run by llama.cpp; for another one the model runs in
            PyTorch, and the size is that of its weights.
    """
    trained = predictions(model.cpu().eval(), data.test_batches())
    if path.suffix == ".gguf":
        return Outcome(_float_row(name, method, model, trained, data, path), ModelReport(name, method))
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    row = ResultRow(name, method, trained.accuracy, size_bytes=size, language=_figures(trained))
    return Outcome(row, ModelReport(name, method))


def _float_row(
    name: str, method: Literal["float", "float-extra"], model: nn.Module, trained: Predictions, data: LanguageData,
    path: Path,
) -> ResultRow:  # fmt: skip
    from isogrid.targets.gguf_export import write_float_gguf
    from isogrid.targets.llamacpp_model import LlamaFile

    write_float_gguf(model, path, data.tokenizer, "F16")
    return measured(name, method, LlamaFile(path), path, trained, data)


def quantized_outcome(
    name: str,
    method: Literal["ptq", "qat"],
    model: nn.Module,
    data: LanguageData,
    path: Path,
    trained: Predictions | None = None,
) -> Outcome:
    """Export a prepared model, verify it, and run it on the test data in PyTorch and in its runtime.

    Args:
        name, method: of the row.
        model: prepared.
        data: with the text.
        path: of the artefact.
        trained: what was trained says about the test data, where the model is another one since it was merged.
    """
    model.cpu().eval()
    artifact = export(with_tokenizer(model, data), path)
    verification = verify(
        model, artifact, islice(data.test_batches(VERIFIED), 1), lambda outputs, batch: data.metric(outputs, batch[-1])
    )
    trained = predictions(model, data.test_batches()) if trained is None else trained
    row = measured(name, method, load(artifact.path), artifact.path, trained, data)
    return Outcome(row, model_report(name, method, model, verification), artifact, verification)


def measured(
    name: str, method: Literal["float", "float-extra", "ptq", "qat"], loaded: Callable[[Tensor], Any], path: Path,
    trained: Predictions, data: LanguageData,
) -> ResultRow:  # fmt: skip
    """The row of a model in its runtime, run on the test data.

    Args:
        name, method: of the row.
        loaded: of input_ids int64 [sequences, length]; what `predictions` takes.
        path: of its file or folder.
        trained: what the forward that was trained says about the test data.
        data: with the text.
    """
    found, prompt = _timed(loaded, data)
    speed = loaded.tokens_per_second(next(iter(data.test_batches(1)))[0]) if isinstance(loaded, Paced) else None
    return ResultRow(
        name,
        method,
        found.accuracy,
        size_bytes=sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*"))),
        artifact=str(path),
        language=_figures(
            found,
            trained_perplexity=trained.perplexity.value,
            agreement=found.agreement(trained),
            prompt_speed=prompt if speed is None else speed.prompt,
            decoding_speed=None if speed is None else speed.decoding,
        ),
    )


def with_tokenizer(model: nn.Module, data: LanguageData) -> nn.Module:
    """The model with its data's tokenizer as an attribute, for artefacts that hold one."""
    model.tokenizer = data.tokenizer
    return model


def _timed(loaded: Callable[[Tensor], Any], data: LanguageData) -> tuple[Predictions, float]:
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
