"""What a model achieves once it is exported: accuracy on its runtime, size, fidelity, latency."""

import os
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
from isogrid.planning.plan import Plan
from isogrid.planning.state import prepared_state
from isogrid.recipes.data import Data
from isogrid.recipes.weights import stored_weights
from isogrid.report import (
    BoundRow,
    Fidelity,
    FloatRow,
    GraphRow,
    LayerStatistics,
    ModelReport,
    PlanRow,
    ReplayRow,
    Report,
    ResultRow,
    SiteRow,
    layer_statistics,
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
        run: runs it once on LATENCY_BATCH examples.
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
    session = open_session(path, {})
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])

    outputs, targets = [], []
    for *inputs, target in data.test_batches():
        outputs.append(run(*inputs))
        targets.append(target)
    row = ResultRow(
        name=name,
        method=method,
        accuracy=data.metric(torch.cat(outputs), torch.cat(targets)),
        size_bytes=path.stat().st_size,
        artifact=str(path),
    )
    examples = _latency_inputs(data)
    return Outcome(row, ModelReport(name, method), lambda: run(*examples))


def quantized_outcome(name: str, method: Literal["ptq", "qat"], model: nn.Module, data: Data, path: Path) -> Outcome:
    """Export a prepared model, run it on the test data in its runtime and compare every code."""
    model = model.cpu().eval()
    artifact = export(model, path)
    found = verify(model, artifact, data.test_batches(), lambda outputs, batch: data.metric(outputs, batch[-1]))
    end, plan = found.end_to_end, prepared_state(model).plan
    row = ResultRow(
        name=name,
        method=method,
        accuracy=end.metric or 0.0,
        size_bytes=artifact.size_bytes,
        differing_codes=found.differing_codes,
        compared_codes=found.compared_codes,
        logits_equal=end.logits_equal,
        artifact=str(path),
    )
    details = ModelReport(
        name=name,
        method=method,
        layers=layers_of(model),
        plan=tuple(plan_rows(plan)),
        floats=tuple(FloatRow(*entry) for entry in plan.floats),
        fidelity=fidelity_of(found),
    )
    loaded = target_from_name(artifact.target).load(artifact)
    inputs = _latency_inputs(data)
    return Outcome(row, details, lambda: loaded(*inputs), found, artifact.versions)


def with_latencies(outcomes: Sequence[Outcome], rounds: int = ROUNDS) -> list[Outcome]:
    """Time all models in turns, so that whatever disturbs the machine disturbs all of them.

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
        target=f"ONNX Runtime {versions.get('onnxruntime', '')} on {os.cpu_count()} CPU cores",
        created=datetime.now().astimezone(),
        rows=tuple(rows),
        models=tuple(outcome.details for outcome in outcomes if outcome.verification is not None),
        versions=versions,
    )
    write_report(report, folder / "report.html")


def layers_of(model: nn.Module) -> tuple[LayerStatistics, ...]:
    """The weights of a prepared model, each held against its grid."""
    found = []
    for weight in stored_weights(model):
        affine, fmt = weight.quantized.affine, weight.quantizer.format
        grid: Tensor | list[float] = fmt.grid.values() if fmt.grid.dimension == 1 else []
        # A format that pads or flattens has scales for more than the weight's own blocks.
        fits = affine.scale is not None and affine.scale.dim() == weight.weight.dim()
        parts = affine._asdict() if fits else {}
        values = weight.quantized.dequantize()
        found.append(layer_statistics(weight.layer, weight.weight, values, grid, str(fmt), **parts))
    return tuple(found)


def plan_rows(plan: Plan) -> list[PlanRow]:
    """The sites of a plan for the report."""
    return [PlanRow(s.name, s.kind, s.format, s.range, s.estimator, s.reason) for s in plan.sites]


def fidelity_of(found: VerificationReport) -> Fidelity:
    """What a verification found, for the report."""
    end = found.end_to_end
    operators = {check.name: check.operator for check in found.graph}
    grouped: dict[tuple[str, str], list[int]] = {}
    for check in found.graph:
        grouped.setdefault((check.operator, check.arithmetic), []).append(check.macs)
    return Fidelity(
        sites=tuple(SiteRow(c.name, c.compared, c.differing, c.max_difference) for c in found.sites),
        replays=tuple(
            ReplayRow(
                name=c.name,
                operator=operators.get(c.name.rpartition(".")[0], ""),
                compared=c.compared,
                differing=c.differing,
                max_difference=c.max_difference,
                bound=f"{c.bound:g} relative" if c.bound else "0 codes",
                holds=c.holds,
            )
            for c in found.replays
        ),
        graph=tuple(
            GraphRow(operator, "integer" if arithmetic == "integer" else "float", len(macs), sum(macs))
            for (operator, arithmetic), macs in grouped.items()
        ),
        bounds=tuple(_bounds(found)),
        logits_equal=end.logits_equal,
        top1_agreement=end.top1_agreement,
        kl=end.kl,
        samples=end.examples,
    )


def _bounds(found: VerificationReport) -> list[BoundRow]:
    differing = sum(check.differing for check in found.parameters)
    as_planned = sum(check.holds for check in found.graph)
    rows = [
        BoundRow("stored values that differ", differing, "0", differing == 0),
        BoundRow("operators as planned", as_planned, f"all {len(found.graph)}", as_planned == len(found.graph)),
    ]
    if found.exact:
        end = found.end_to_end
        rows.append(BoundRow("largest difference of outputs", end.max_difference, "0", end.logits_equal))
    return rows


def _latency_inputs(data: Data) -> tuple[Any, ...]:
    return next(data.test_batches(LATENCY_BATCH))[:-1]
