"""What a report shows, as plain frozen data. The floors below fill it in; this floor only draws it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, get_args

from isogrid.errors import IsogridError

Method = Literal["float", "float-extra", "ptq", "qat"]
Arithmetic = Literal["integer", "float"]


@dataclass(frozen=True)
class LanguageFigures:
    """What a language model achieved beside the share of tokens that it predicted best.

    Attributes:
        perplexity: on held-out text, in the runtime; of a model without an artefact, in PyTorch.
        low, high: ends of its 95 % interval.
        tokens: predicted.
        trained_perplexity: of the forward that was trained, on the same text.
        agreement: share of tokens that the runtime and the trained forward both predict best, in [0, 1].
        prompt_speed, decoding_speed: tokens a second, reading a text and writing one after the other.

    >>> LanguageFigures(12.0, 11.0, 13.0, tokens=20_000).agreement is None
    True
    """

    perplexity: float
    low: float
    high: float
    tokens: int
    trained_perplexity: float | None = None
    agreement: float | None = None
    prompt_speed: float | None = None
    decoding_speed: float | None = None


@dataclass(frozen=True)
class ResultRow:
    """One model and what it achieved: a line of `result.json`, of the page's first table and of the terminal's table.

    Attributes:
        name: what was run, such as "W4A8".
        method: "float", "float-extra" (float with the same extra training as QAT, the honest control), "ptq" or "qat".
        accuracy: share of right answers, in [0, 1].
        size_bytes: size of the artefact's file.
        latency_ms: time of one run of the artefact on its runtime.
        differing_codes: integer codes that differ between the runtime and the reference; None for a float model.
        compared_codes: integer codes that were compared; None for a float model.
        logits_equal: whether the logits are equal bit for bit; None where nothing was compared.
        artifact: path of the file, None where nothing was exported.
        language: what else a language model achieved.

    Raises:
        IsogridError: the method is unknown, or a figure is outside what it can be.

    >>> ResultRow("W8A8", "qat", accuracy=0.98, differing_codes=0, compared_codes=640).exact
    True
    """

    name: str
    method: Method
    accuracy: float
    size_bytes: int | None = None
    latency_ms: float | None = None
    differing_codes: int | None = None
    compared_codes: int | None = None
    logits_equal: bool | None = None
    artifact: str | None = None
    language: LanguageFigures | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise IsogridError(
                f"result row {self.name!r}: method {self.method!r} is not one of {', '.join(get_args(Method))}."
            )
        if not 0 <= self.accuracy <= 1:
            raise IsogridError(
                f"result row {self.name!r}: accuracy {self.accuracy} is not in [0, 1]. Give a share, not per cent."
            )
        for label in ("size_bytes", "latency_ms", "differing_codes", "compared_codes"):
            value = getattr(self, label)
            if value is not None and not 0 <= value < float("inf"):
                raise IsogridError(f"result row {self.name!r}: {label} {value} is not a finite number of at least 0.")

    @property
    def exact(self) -> bool | None:
        """True where codes were compared and none differs, False where one differs, None where none were compared."""
        return self.differing_codes == 0 if self.compared_codes else None


@dataclass(frozen=True)
class ScaleSummary:
    """The scales of one layer: how many there are, and their spread.

    >>> ScaleSummary(count=1, minimum=0.5, median=0.5, maximum=0.5).count
    1
    """

    count: int
    minimum: float
    median: float
    maximum: float


@dataclass(frozen=True)
class LayerStatistics:
    """The weights of one layer held against their grid, all channels on one axis. `layer_statistics` makes it.

    Attributes:
        name: the layer's qualified name.
        format: the format's name, such as "int4/channel".
        shape: of the weight.
        unit: what the axis of the histogram counts: "weight ÷ scale", or "weight" where no scale was given.
        histogram_counts: weights in each bin.
        histogram_edges: of the bins, one more than there are counts; both are empty where no weight can be placed.
        below, above: finite weights that lie outside the histogram's edges.
        grid_values: ascending, on the axis of the histogram.
        grid_counts: quantised weights at each grid value.
        sqnr_db: signal to quantisation noise in dB; infinite where the grid holds every weight exactly, None where
            there is no signal.
        saturation: share of the finite weights that the grid clips, None where there is no grid or no weight.
        scale: of the layer's scales, None where no scale was given.
        notes: what a reader must know to trust the figures, such as weights that are NaN.

    >>> LayerStatistics("fc", "int8/tensor", (2, 0), "weight", (), ()).sqnr_db is None
    True
    """

    name: str
    format: str
    shape: tuple[int, ...]
    unit: str
    histogram_counts: tuple[int, ...]
    histogram_edges: tuple[float, ...]
    below: int = 0
    above: int = 0
    grid_values: tuple[float, ...] = ()
    grid_counts: tuple[int, ...] = ()
    sqnr_db: float | None = None
    saturation: float | None = None
    scale: ScaleSummary | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanRow:
    """A site of the plan that is quantised.

    >>> PlanRow("fc.weight", "weight", "int8/channel", "mse", "ste", "rule: *").kind
    'weight'
    """

    site: str
    kind: str
    format: str
    range: str
    estimator: str
    reason: str


@dataclass(frozen=True)
class FloatRow:
    """A part of the model that stays float, and why.

    >>> FloatRow("fc.output", "the last layer gives float logits").name
    'fc.output'
    """

    name: str
    reason: str


@dataclass(frozen=True)
class SiteRow:
    """Codes of one quantised tensor, runtime against reference; `max_difference` is in codes.

    >>> SiteRow("fc.input", compared=640, differing=0, max_difference=0).holds
    True
    """

    site: str
    compared: int
    differing: int
    max_difference: float

    @property
    def holds(self) -> bool:
        """Whether no code differs."""
        return self.differing == 0


@dataclass(frozen=True)
class ReplayRow:
    """One op of the runtime, computed again by the reference on the runtime's own inputs.

    `bound` says in words what was demanded, such as "0 codes" or "1e-6 relative"; `max_difference` is in its unit.

    >>> ReplayRow("conv1", "QLinearConv", 640, 0, 0.0, bound="0 codes", holds=True).operator
    'QLinearConv'
    """

    name: str
    operator: str
    compared: int
    differing: int
    max_difference: float
    bound: str
    holds: bool


@dataclass(frozen=True)
class BoundRow:
    """A bound of the whole model: what was measured and what was demanded.

    >>> BoundRow("top-1 agreement", measured=1.0, bound="at least 0.999", holds=True).holds
    True
    """

    name: str
    measured: float
    bound: str
    holds: bool


@dataclass(frozen=True)
class GraphRow:
    """Ops of one type in the graph that the runtime really runs, and the multiply-accumulates in them.

    >>> GraphRow("QLinearConv", "integer", count=4, macs=1_000_000).macs
    1000000
    """

    operator: str
    arithmetic: Arithmetic
    count: int
    macs: int


@dataclass(frozen=True)
class Fidelity:
    """What verification found for one model: runtime against reference.

    Attributes:
        sites: per quantised tensor.
        replays: per op of the runtime.
        graph: the runtime's own optimised graph, read back.
        bounds: of the whole model.
        logits_equal: bit for bit.
        top1_agreement: share of samples with the same answer, in [0, 1].
        kl: mean Kullback-Leibler divergence of the answers' distributions, in nats.
        samples: how many inputs were run.

    >>> Fidelity(sites=(SiteRow("x", 8, 1, 1.0),)).holds
    False
    """

    sites: tuple[SiteRow, ...] = ()
    replays: tuple[ReplayRow, ...] = ()
    graph: tuple[GraphRow, ...] = ()
    bounds: tuple[BoundRow, ...] = ()
    logits_equal: bool | None = None
    top1_agreement: float | None = None
    kl: float | None = None
    samples: int | None = None

    @property
    def compared(self) -> int:
        """Codes compared, over all sites."""
        return sum(row.compared for row in self.sites)

    @property
    def differing(self) -> int:
        """Codes that differ, over all sites."""
        return sum(row.differing for row in self.sites)

    @property
    def holds(self) -> bool:
        """Whether every site, replay and bound holds."""
        verdicts = (
            [row.holds for row in self.sites],
            [row.holds for row in self.replays],
            [row.holds for row in self.bounds],
        )
        return all(map(all, verdicts))

    @property
    def integer_macs(self) -> int:
        """Multiply-accumulates that the runtime computes on integers."""
        return sum(row.macs for row in self.graph if row.arithmetic == "integer")

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of the runtime's graph."""
        return sum(row.macs for row in self.graph)


@dataclass(frozen=True)
class ModelReport:
    """The details of one model. `name` and `method` are those of its `ResultRow`, which links to it.

    >>> ModelReport("W8A8", "qat").layers
    ()
    """

    name: str
    method: Method
    layers: tuple[LayerStatistics, ...] = ()
    plan: tuple[PlanRow, ...] = ()
    floats: tuple[FloatRow, ...] = ()
    fidelity: Fidelity | None = None


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        title, subtitle: what was run, in the reader's words.
        target: the runtime, such as "ONNX Runtime 1.31, CPU".
        created: when.
        rows: one a model, in the order of the table; speed-ups are against the first float row that has a latency.
        models: the details, where there are any.
        versions: name to version of what took part.

    >>> Report("Digits", "a small CNN", "ONNX Runtime", datetime(2026, 1, 31)).rows
    ()
    """

    title: str
    subtitle: str
    target: str
    created: datetime
    rows: tuple[ResultRow, ...] = ()
    models: tuple[ModelReport, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


def speed_up(row: ResultRow, rows: Sequence[ResultRow]) -> float | None:
    """How many times faster a row is than the first float row that has a latency.

    Returns:
        The ratio, or None where one of the two latencies is missing or zero.

    >>> rows = [ResultRow("CNN", "float", 0.9, latency_ms=3.0), ResultRow("CNN", "qat", 0.9, latency_ms=1.5)]
    >>> speed_up(rows[1], rows)
    2.0
    """
    baseline = next((other.latency_ms for other in rows if other.method == "float" and other.latency_ms), None)
    return baseline / row.latency_ms if baseline and row.latency_ms else None
