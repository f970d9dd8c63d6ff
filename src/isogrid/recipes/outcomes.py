"""What a model achieves once it is exported: accuracy on its runtime, size, fidelity, latency."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from statistics import median
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
from isogrid.targets import target_from_name
from isogrid.targets.onnx_runtime_session import open_session
from isogrid.targets.onnxruntime import export_float

LATENCY_BATCH = 64
ROUNDS = 30

Call = Callable[[], Any]


@dataclass(frozen=True)
class Outcome:
    """One exported model.

    Attributes:
        row: its line in the table of results.
        details: its part of the report.
        run: runs it once on LATENCY_BATCH examples, on one thread.
        verification: None for a float model.
        versions: of the packages that wrote the artefact.
    """

    row: ResultRow
    details: ModelReport
    run: Call
    verification: VerificationReport | None = None
    versions: dict[str, str] = field(default_factory=dict)


def float_outcome(
    name: str, method: Literal["float", "float-extra"], model: nn.Module, data: Data, path: Path
) -> Outcome:
    """Export a float model to ONNX and run it on the test data."""
    model = model.cpu().eval()
    export_float(model, data.example_inputs, path)
    session = open_session(path, {}, threads=1)
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])

    outputs, targets = [], []
    for *inputs, target in data.test_batches():
        outputs.append(run(*inputs))
        targets.append(target)
    row = result_row(name, method, data.metric(torch.cat(outputs), torch.cat(targets)), path)
    examples = _latency_inputs(data)
    return Outcome(row, ModelReport(name, method), lambda: run(*examples))


def quantized_outcome(name: str, method: Literal["ptq", "qat"], model: nn.Module, data: Data, path: Path) -> Outcome:
    """Export a prepared model, run it on the test data in its runtime and compare every code."""
    model = model.cpu().eval()
    artifact = export(model, path)
    found = verify(model, artifact, data.test_batches(), lambda outputs, batch: data.metric(outputs, batch[-1]))
    row = result_row(name, method, found.end_to_end.metric or 0.0, artifact, found)
    loaded, examples = target_from_name(artifact.target).load(artifact, threads=1), _latency_inputs(data)
    return Outcome(row, model_report(name, method, model, found), lambda: loaded(*examples), found, artifact.versions)


def with_latencies(outcomes: Sequence[Outcome], rounds: int = ROUNDS) -> list[Outcome]:
    """Time all models in turns, so that whatever disturbs the machine disturbs all of them.

    Each runs on one thread: the waiting threads of several sessions would take turns off each other.

    Returns:
        The outcomes with `latency_ms`: the median over the rounds of one run on LATENCY_BATCH examples.
    """
    times: list[list[float]] = [[] for _ in outcomes]
    for turn in range(rounds + 1):
        for outcome, measured in zip(outcomes, times, strict=True):
            start = time.perf_counter()
            outcome.run()
            if turn:  # the first is a warm-up
                measured.append(1e3 * (time.perf_counter() - start))
    return [
        replace(outcome, row=replace(outcome.row, latency_ms=median(measured)))
        for outcome, measured in zip(outcomes, times, strict=True)
    ]


def write_outcomes(outcomes: Sequence[Outcome], folder: Path, title: str, subtitle: str) -> None:
    """Write `result.json` and `report.html` into a folder."""
    rows = [outcome.row for outcome in outcomes]
    write_results(rows, folder / "result.json")
    versions = next((o.versions for o in outcomes if o.versions), {})
    report = Report(
        title=title,
        subtitle=subtitle,
        target=f"ONNX Runtime {versions.get('onnxruntime', '')}, one CPU thread, {LATENCY_BATCH} examples a run",
        created=datetime.now().astimezone(),
        rows=tuple(rows),
        models=tuple(outcome.details for outcome in outcomes if outcome.verification is not None),
        versions=versions,
    )
    write_report(report, folder / "report.html")


def _latency_inputs(data: Data) -> tuple[Any, ...]:
    return next(data.test_batches(LATENCY_BATCH))[:-1]
