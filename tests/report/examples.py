"""One small report that has something of everything, with names that try to break out of the page."""

from datetime import UTC, datetime

import torch

from isogrid.report import (
    BoundRow,
    Fidelity,
    FloatRow,
    GraphRow,
    ModelReport,
    PlanRow,
    ReplayRow,
    Report,
    ResultRow,
    SiteRow,
    layer_statistics,
)

HOSTILE = "</script><script>alert('x')</script><b>&\"%{x}{{ 7 * 7 }}"

ROWS = (
    ResultRow("CNN", "float", 0.9833, 161_233, 0.412, artifact="float.onnx"),
    ResultRow("CNN", "float-extra", 0.9861, 161_233, 0.409, artifact="float-extra.onnx"),
    ResultRow("W2A8", "ptq", 0.4139, 18_112, 0.118, 0, 3_412_800, True, "w2a8-ptq.onnx"),
    ResultRow("W2A8", "qat", 0.975, 18_112, 0.103, 0, 3_412_800, True, "w2a8-qat.onnx"),
)


def report(name: str = "block.conv1", rows: tuple[ResultRow, ...] = ROWS) -> Report:
    """A report of one QAT model whose layer, sites and ops carry `name`."""
    weight = torch.linspace(-1, 1, 64).reshape(4, 16)
    scale = torch.tensor([[0.5], [0.25], [0.5], [1.0]])
    quantized = (weight / scale).round().clamp(-2, 1) * scale
    fidelity = Fidelity(
        sites=(SiteRow(name, 640, 0, 0), SiteRow("fc.input", 64, 3, 2)),
        replays=(ReplayRow(name, name, 640, 0, 0.0, "0 codes", True),),
        graph=(GraphRow(name, "integer", 3, 750), GraphRow("Gemm", "float", 1, 250)),
        bounds=(BoundRow(name, 1.0, "at least 0.999", True),),
        logits_equal=True,
        top1_agreement=1.0,
        kl=0.0,
        samples=360,
    )
    model = ModelReport(
        name="W2A8",
        method="qat",
        layers=(layer_statistics(name, weight, quantized, range(-2, 2), name, scale=scale),),
        plan=(PlanRow(name, "weight", "int2/channel", "mse", "lsq", name),),
        floats=(FloatRow(name, name),),
        fidelity=fidelity,
    )
    created = datetime(2026, 1, 31, 12, 30, tzinfo=UTC)
    return Report(name, name, "ONNX Runtime", created, rows, (model,), {"isogrid": "0.1.0", name: name})
