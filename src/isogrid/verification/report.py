"""The verification report: what was compared, what differs, and whether every bound holds."""

import json
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class SiteCheck:
    """Codes of one quantised tensor, runtime against reference.

    Attributes:
        name: of the site.
        compared, differing: how many codes.
        max_difference: the largest distance between two codes.
    """

    name: str
    compared: int
    differing: int
    max_difference: int

    @property
    def holds(self) -> bool:
        """Whether all codes are equal."""
        return self.differing == 0


@dataclass(frozen=True)
class ReplayCheck:
    """One operation, computed by the reference on the runtime's own inputs.

    Attributes:
        name: of the operation's output.
        compared, differing: values or codes.
        max_difference: in codes, or relative to the largest value where the output is float.
        bound: the largest difference allowed.
    """

    name: str
    compared: int
    differing: int
    max_difference: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the bound."""
        return self.max_difference <= self.bound


@dataclass(frozen=True)
class ParameterCheck:
    """One stored tensor, file against reference: weight codes, scales, zero points, bias codes."""

    name: str
    compared: int
    differing: int

    @property
    def holds(self) -> bool:
        """Whether all entries are equal."""
        return self.differing == 0


@dataclass(frozen=True)
class GraphCheck:
    """What the runtime made of one layer.

    Attributes:
        name: of the layer.
        operator: the runtime's operator.
        arithmetic: "integer" or "float".
        macs: multiplications with accumulation for one example.
        holds: whether this is what was planned.
    """

    name: str
    operator: str
    arithmetic: str
    macs: int
    holds: bool


@dataclass(frozen=True)
class EndToEnd:
    """Outputs of the whole model, runtime against reference.

    Attributes:
        examples: how many.
        logits_equal: bit for bit.
        max_difference: of outputs, absolute.
        top1_agreement: share of examples with the same largest output, in [0, 1].
        kl: mean Kullback-Leibler divergence of the softmax outputs, reference to runtime, in nats.
        metric, reference_metric: of the task, where one was given.
    """

    examples: int
    logits_equal: bool
    max_difference: float
    top1_agreement: float
    kl: float
    metric: float | None = None
    reference_metric: float | None = None


@dataclass(frozen=True)
class VerificationReport:
    """All checks of one artefact; true where every bound holds.

    Attributes:
        artifact: path; target: name of the runtime.
        exact: whether the arithmetic promises equality bit for bit, as static integers do.
        parameters, sites, replays, graph: the checks.
        end_to_end: outputs.
        problems: what no row can hold, such as a site that the file does not have.
    """

    artifact: str
    target: str
    exact: bool
    parameters: tuple[ParameterCheck, ...]
    sites: tuple[SiteCheck, ...]
    replays: tuple[ReplayCheck, ...]
    graph: tuple[GraphCheck, ...]
    end_to_end: EndToEnd
    problems: tuple[str, ...] = field(default=())

    @property
    def compared_codes(self) -> int:
        """Codes compared, over all sites."""
        return sum(site.compared for site in self.sites)

    @property
    def differing_codes(self) -> int:
        """Codes that differ, over all sites."""
        return sum(site.differing for site in self.sites)

    @property
    def failures(self) -> list[str]:
        """What does not hold, in words, the cause before its consequences."""
        lines = list(self.problems)
        lines += [
            f"stored tensor {c.name}: {c.differing} of {c.compared} entries differ"
            for c in self.parameters
            if not c.holds
        ]
        lines += [
            f"operation {c.name}: {c.differing} of {c.compared} values differ on the runtime's own inputs, "
            f"by up to {c.max_difference:g} (bound {c.bound:g})"
            for c in self.replays
            if not c.holds
        ]
        lines += [
            f"layer {c.name} runs as {c.operator} in {c.arithmetic} arithmetic" for c in self.graph if not c.holds
        ]
        if self.exact:
            lines += [f"site {c.name}: {c.differing} of {c.compared} codes differ" for c in self.sites if not c.holds]
            if not self.end_to_end.logits_equal:
                lines.append(f"outputs differ by up to {self.end_to_end.max_difference:g}")
        return lines

    def __bool__(self) -> bool:
        return not self.failures

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({**asdict(self), "holds": bool(self), "failures": self.failures}, indent=1)

    def table(self) -> Table:
        """The checks as one Rich table."""
        end = self.end_to_end
        table = Table(title=f"{self.artifact} in {self.target}", title_justify="left")
        for column in ("check", "compared", "differing", "holds"):
            table.add_column(column, justify="left" if column == "check" else "right")
        stored = (sum(c.compared for c in self.parameters), sum(c.differing for c in self.parameters))
        replayed = (sum(c.compared for c in self.replays), sum(c.differing for c in self.replays))
        integer = sum(c.macs for c in self.graph if c.arithmetic == "integer")
        outputs = "none" if end.logits_equal else f"up to {end.max_difference:.3g}"
        rows = (
            ("stored codes, scales and zero points", *stored, all(c.holds for c in self.parameters)),
            ("codes at every quantised tensor", self.compared_codes, self.differing_codes, self.differing_codes == 0),
            ("operations on the runtime's own inputs", *replayed, all(c.holds for c in self.replays)),
            ("outputs, examples", end.examples, outputs, end.logits_equal or not self.exact),
        )
        for name, compared, differing, holds in rows:
            table.add_row(name, f"{compared:,}", str(differing), "yes" if holds else "no")
        macs = sum(c.macs for c in self.graph)
        table.add_row(
            "multiplications in integers",
            f"{macs:,}",
            f"{macs - integer:,}",
            "yes" if all(c.holds for c in self.graph) else "no",
        )
        table.add_section()
        table.add_row("top-1 agreement", f"{end.top1_agreement:.2%}", "", "")
        table.add_row("KL divergence", f"{end.kl:.3g}", "", "")
        if end.metric is not None and end.reference_metric is not None:
            table.add_row("metric, runtime and reference", f"{end.metric:.4f}", f"{end.reference_metric:.4f}", "")
        return table

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as capture:
            console.print(self.table())
            for line in self.failures:
                console.print(f"FAILS: {line}", markup=False, highlight=False)
        return capture.get().rstrip()
