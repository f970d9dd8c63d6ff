"""What a model achieves once it is exported: accuracy on its runtime, size, fidelity, latency."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isogrid.api import VerificationReport, export, verify
from isogrid.recipes.data import Data
from isogrid.report import (
    ModelReport,
    Report,
    ResultRow,
    model_report,
    result_row,
    write_report,
    write_results,
)
from isogrid.targets import Artifact, target_from_name
from isogrid.targets.onnx_artifact import export_float
from isogrid.targets.onnx_runtime_session import open_session

LATENCY_BATCH = 64
ROUNDS = 100


@dataclass(frozen=True)
class Outcome:
    """One exported model.

    Attributes:
        row: its line in the table of results.
        details: its part of the report.
        artifact: None for a float model.
        verification: None for a float model.
    """

    row: ResultRow
    details: ModelReport
    artifact: Artifact | None = None
    verification: VerificationReport | None = None


def float_outcome(
    name: str, method: Literal["float", "float-extra"], model: nn.Module, data: Data, path: Path
) -> Outcome:
    """Export a float model to ONNX and run it on the test data."""
    export_float(model.cpu().eval(), tuple(next(data.test_batches(2))[:-1]), path)
    run = _float_model(path)
    outputs, targets = [], []
    for *inputs, target in data.test_batches():
        outputs.append(run(*inputs))
        targets.append(target)
    row = result_row(name, method, data.metric(torch.cat(outputs), torch.cat(targets)), path)
    return Outcome(row, ModelReport(name, method))


def quantized_outcome(name: str, method: Literal["ptq", "qat"], model: nn.Module, data: Data, path: Path) -> Outcome:
    """Export a prepared model, run it on the test data in its runtime and compare every code."""
    artifact = export(model.cpu().eval(), path)
    found = verify(model, artifact, data.test_batches(), lambda outputs, batch: data.metric(outputs, batch[-1]))
    row = result_row(name, method, found.end_to_end.metric or 0.0, artifact, found)
    return Outcome(row, model_report(name, method, model, found), artifact, found)


def with_latencies(outcomes: Sequence[Outcome], data: Data, rounds: int = ROUNDS) -> list[Outcome]:
    """Time all models in turns, so that whatever disturbs the machine disturbs all of them.

    Each runs on one thread: the waiting threads of several sessions would take turns off each other.

    Returns:
        The outcomes with `latency_ms`: the fastest round on LATENCY_BATCH examples, for disturbances only add.
    """
    runs = [_runtime(outcome) for outcome in outcomes]
    inputs = next(data.test_batches(LATENCY_BATCH))[:-1]
    times: list[list[float]] = [[] for _ in outcomes]
    for turn in range(rounds + 1):
        for run, measured in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(*inputs)
            if turn:  # the first is a warm-up
                measured.append(1e3 * (time.perf_counter() - start))
    return [
        replace(outcome, row=replace(outcome.row, latency_ms=min(measured)))
        for outcome, measured in zip(outcomes, times, strict=True)
    ]


def write_outcomes(
    outcomes: Sequence[Outcome], folder: Path, title: str, subtitle: str, setting: str | None = None
) -> None:
    """Write `result.json` and `report.html` into a folder.

    Args:
        outcomes: of the models, in order.
        folder: where to.
        title, subtitle: of the page.
        setting: where the models ran; ONNX Runtime as `with_latencies` sets it up, if not given.
    """
    rows = [outcome.row for outcome in outcomes]
    write_results(rows, folder / "result.json")
    versions = next((outcome.artifact.versions for outcome in outcomes if outcome.artifact), {})
    report = Report(
        title=title,
        subtitle=subtitle,
        target=setting
        or f"ONNX Runtime {versions.get('onnxruntime', '')}, one CPU thread, {LATENCY_BATCH} examples a run",
        created=datetime.now().astimezone(),
        rows=tuple(rows),
        models=tuple(outcome.details for outcome in outcomes if outcome.verification is not None),
        versions=versions,
    )
    write_report(report, folder / "report.html")


def _runtime(outcome: Outcome) -> Callable[..., Any]:
    """The exported model in its runtime, on one thread."""
    if outcome.artifact is None:
        return _float_model(Path(outcome.row.artifact or ""))
    return target_from_name(outcome.artifact.target).load(outcome.artifact, threads=1)


def _float_model(path: Path) -> Callable[..., Tensor]:
    session = open_session(path, {}, threads=1)
    names = [entry.name for entry in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]
    )
