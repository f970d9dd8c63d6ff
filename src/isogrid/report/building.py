"""From a prepared model and its verification to what the report shows of them."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isogrid.formats import NativeGrid
from isogrid.layers.layer import QuantizedLayer
from isogrid.layers.weights import weight_of
from isogrid.planning.state import prepared_state, weight_quantizers
from isogrid.report.data import (
    BoundRow,
    Fidelity,
    FloatRow,
    GraphRow,
    LayerStatistics,
    Method,
    ModelReport,
    PlanRow,
    ReplayRow,
    ResultRow,
    SiteRow,
)
from isogrid.report.statistics import layer_statistics
from isogrid.targets import Artifact
from isogrid.verification import VerificationReport


def result_row(
    name: str,
    method: Method,
    accuracy: float,
    artifact: Artifact | Path | str | None = None,
    verification: VerificationReport | None = None,
    latency_ms: float | None = None,
) -> ResultRow:
    """A model's line in the table of results.

    Args:
        name, method, accuracy, latency_ms: see `ResultRow`.
        artifact: what was exported; its size is read from the file.
        verification: of the artefact; None for a float model.

    >>> result_row("CNN", "float", accuracy=0.5).compared_codes is None
    True
    """
    path = artifact.path if isinstance(artifact, Artifact) else None if artifact is None else Path(artifact)
    return ResultRow(
        name=name,
        method=method,
        accuracy=accuracy,
        size_bytes=None if path is None else path.stat().st_size,
        latency_ms=latency_ms,
        differing_codes=None if verification is None else verification.differing_codes,
        compared_codes=None if verification is None else verification.compared_codes,
        logits_equal=None if verification is None else verification.end_to_end.logits_equal,
        artifact=None if path is None else str(path),
    )


def model_report(
    name: str, method: Method, model: nn.Module, verification: VerificationReport | None = None
) -> ModelReport:
    """The details of one model: its plan, what stays float, every quantised weight on its grid, and the verification.

    Args:
        name, method: those of its result row.
        model: prepared and calibrated.
        verification: of its artefact, or None.

    Raises:
        PlanError: the model is not prepared.
    """
    plan = prepared_state(model).plan
    return ModelReport(
        name=name,
        method=method,
        layers=layers(model),
        plan=tuple(PlanRow(s.name, s.kind, s.format, s.range, s.estimator, s.reason) for s in plan.sites),
        floats=tuple(FloatRow(what, why) for what, why in plan.floats),
        fidelity=None if verification is None else fidelity(verification),
    )


@torch.no_grad()
def layers(model: nn.Module) -> tuple[LayerStatistics, ...]:
    """Statistics of every quantised weight of a prepared model, by the codes and scales that are exported."""
    found = []
    for quantizer_path in weight_quantizers(model):
        path = quantizer_path.rpartition(".")[0]
        weight = _stored_weight(model.get_submodule(path))
        fmt: Any = weight.format
        is_listed = fmt.grid.dimension == 1 and not isinstance(fmt.grid, NativeGrid)
        grid = fmt.grid.values() if is_listed else []
        parts = {"scale": weight.scale, "zero_point": weight.zero_point, "offset": weight.offset}
        found.append(layer_statistics(path, weight.original, weight.quantized, grid, str(fmt), **parts))
    return tuple(found)


def fidelity(verification: VerificationReport) -> Fidelity:
    """What a verification found, row by row."""
    end = verification.end_to_end
    counts: Counter[tuple[str, str]] = Counter()
    macs: Counter[tuple[str, str]] = Counter()
    for check in verification.graph:
        kind = (check.operator, "integer" if check.arithmetic == "integer" else "float")
        counts[kind] += 1
        macs[kind] += check.macs
    return Fidelity(
        sites=tuple(SiteRow(c.name, c.compared, c.differing, c.max_difference) for c in verification.sites),
        replays=tuple(
            ReplayRow(c.name, c.operator, c.compared, c.differing, c.max_difference, _demanded(c), c.holds)
            for c in verification.replays
        ),
        graph=tuple(
            GraphRow(operator, "integer" if arithmetic == "integer" else "float", count, macs[operator, arithmetic])
            for (operator, arithmetic), count in counts.items()
        ),
        bounds=tuple(_bounds(verification)),
        logits_equal=end.logits_equal,
        top1_agreement=end.top1_agreement,
        kl=end.kl,
        samples=end.examples,
    )


def _demanded(check: Any) -> str:
    if check.bound == 0:
        return "0 codes" if check.of_codes else "0"
    return f"0 codes beyond {check.bound:.0e} relative" if check.of_codes else f"{check.bound:.0e} relative"


def _bounds(verification: VerificationReport) -> list[BoundRow]:
    """What no site or replay holds."""
    stored = sum(check.differing for check in verification.parameters)
    astray = sum(not check.holds for check in verification.graph)
    rows = [
        BoundRow("stored values that differ", stored, "0", stored == 0),
        BoundRow("operators in another arithmetic than planned", astray, "0", astray == 0),
    ]
    exact = [check for check in verification.outputs if check.exact]
    if exact:
        differing = sum(check.differing for check in exact)
        rows.append(BoundRow("output values that differ", differing, "0", differing == 0))
    if verification.problems:
        rows.append(BoundRow(verification.problems[0], len(verification.problems), "0", False))
    return rows + [BoundRow(b.name, b.measured, b.demanded, b.holds) for b in verification.end_to_end.bounds]


class _StoredWeight(NamedTuple):
    """A weight beside what its codes stand for, in the units of the model."""

    original: Tensor
    quantized: Tensor
    format: Any
    scale: Tensor | None
    zero_point: Tensor | None = None
    offset: Tensor | None = None


def _stored_weight(layer: Any) -> _StoredWeight:
    quantizer, weight = layer.weight_quantizer, weight_of(layer).detach().float()
    if isinstance(layer, QuantizedLayer) and layer.arithmetic == "static":
        codes, *_ = layer.integer_parts()
        factor = _weight_factor(layer).reshape(-1, *[1] * (weight.dim() - 1))
        scale = quantizer.stored().scale * factor.abs()
        # Channels whose batch norm has a negative factor are stored with their sign turned.
        return _StoredWeight(weight * factor.sign(), codes * scale, quantizer.format, scale)
    stored = quantizer.quantize(weight)
    affine = stored.affine
    # A format that pads or flattens has scales for more than the weight's own blocks.
    fits = affine.scale is not None and affine.scale.dim() == weight.dim()
    return _StoredWeight(weight, stored.dequantize(), quantizer.format, *(affine if fits else (None, None, None)))


def _weight_factor(layer: QuantizedLayer) -> Tensor:
    scale, input_quantizer = layer.weight_quantizer.stored().scale, layer.input_quantizer
    assert scale is not None and input_quantizer is not None
    input_scale = input_quantizer.stored().scale
    assert input_scale is not None
    return layer.folded(scale, input_scale.reshape(1)).weight_factor
