"""The verification report: what was compared, what differs, and whether every bound holds."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from isogrid.verification.printing import printed, report_table

TOP1_BOUND = 0.99
"""Where float arithmetic is not reproduced bit for bit, this share of answers must agree, or all but one."""

COSINE_BOUND = 0.99
"""Or, of features that are no answers, the mean cosine of runtime and reference must be this."""

KL_BOUND = 1e-3
"""And the answers' distributions may differ by this many nats on average."""

METRIC_BOUND = 0.01
"""And the task's metric by this share of its value, or by one example's weight."""


@dataclass(frozen=True)
class ParameterCheck:
    """One stored tensor, file against reference: weight codes, scales, zero points, bias codes.

    Attributes:
        name: in the file.
        compared, differing: entries.
        missing: whether the file has no such tensor.
    """

    name: str
    compared: int
    differing: int
    missing: bool = False

    @property
    def holds(self) -> bool:
        """Whether all entries are equal."""
        return self.differing == 0


@dataclass(frozen=True)
class GraphCheck:
    """What the runtime made of one operator that multiplies.

    Attributes:
        name: of the layer or operation.
        operator: the runtime's own, which may be several fused into one.
        arithmetic: "integer", "float", or "no" where there is no such operator.
        planned: "integer" or "float".
        macs: multiplications with accumulation for one example.
    """

    name: str
    operator: str
    arithmetic: str
    planned: str
    macs: int

    @property
    def holds(self) -> bool:
        """Whether this is what was planned."""
        return self.arithmetic == self.planned


@dataclass(frozen=True)
class ReplayCheck:
    """One operation, computed by the reference on the runtime's own inputs.

    Attributes:
        name: of the operation's output.
        operator: the runtime's.
        compared, differing: values or codes. Codes count as differing only where a float difference within the bound
            does not explain them.
        max_difference: in codes, or relative to the largest value where the output is float.
        bound: the largest difference that is allowed, of float values; 0 where all is integer.
        of_codes: whether codes were compared.
        share: of the codes may be the neighbours of those demanded, where a runtime's rounding is not reproduced.
    """

    name: str
    operator: str
    compared: int
    differing: int
    max_difference: float
    bound: float
    of_codes: bool
    share: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the difference is within the bound."""
        if self.of_codes:
            return self.differing <= self.share * self.compared and (self.max_difference <= 1 or self.differing == 0)
        return self.differing == 0 or self.max_difference <= self.bound


@dataclass(frozen=True)
class SiteCheck:
    """Codes of one quantised tensor, runtime against reference, both from the same inputs of the model.

    Attributes:
        name: of the site.
        compared, differing: how many codes.
        max_difference: the largest distance between two codes.
        exact: whether no float arithmetic lies before it, so that the codes must be equal.
    """

    name: str
    compared: int
    differing: int
    max_difference: float
    exact: bool = True

    @property
    def holds(self) -> bool:
        """Whether all codes are equal, where they must be."""
        return self.differing == 0 or not self.exact


@dataclass(frozen=True)
class OutputCheck:
    """One output of the model; attributes as for `SiteCheck`, differences absolute."""

    name: str
    compared: int
    differing: int
    max_difference: float
    exact: bool = True

    @property
    def holds(self) -> bool:
        """Whether all values are equal, where they must be."""
        return self.differing == 0 or not self.exact


@dataclass(frozen=True)
class DeploymentCheck:
    """One output of the artefact as it is deployed, against the same output while its quantised tensors are looked at.

    A tensor that is looked at has to exist, and what a runtime fuses over it otherwise falls apart.

    Attributes:
        name: of the output.
        compared, differing: values.
        max_difference: relative to the largest value.
        bound: the largest that is allowed: 0 where all is integer, and what float operations explain where they follow
            on integers alone.
    """

    name: str
    compared: int
    differing: int
    max_difference: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the bound."""
        return self.differing == 0 or self.max_difference <= self.bound


@dataclass(frozen=True)
class Bound:
    """A figure of the whole model: what was measured, and what was demanded in words."""

    name: str
    measured: float
    demanded: str
    holds: bool


@dataclass(frozen=True)
class EndToEnd:
    """The model's outputs, runtime against reference.

    Attributes:
        examples: how many were run.
        logits_equal: whether all outputs are equal, every bit.
        max_difference: of outputs, absolute.
        top1_agreement: share of rows of the first output with the same largest entry, in [0, 1]; None where it cannot
            be scores of classes.
        kl: mean Kullback-Leibler divergence of its softmax, reference to runtime, in nats; or None.
        metric, reference_metric: of the task, where one was given.
        rows: how many rows of scores or features were compared.
        not_finite: rows that were left out, for they hold NaN or infinity.
        cosine: mean cosine of the first output's rows, runtime against reference, where its name says that it holds
            features; or None.
    """

    examples: int
    logits_equal: bool
    max_difference: float
    top1_agreement: float | None = None
    kl: float | None = None
    metric: float | None = None
    reference_metric: float | None = None
    rows: int = 0
    not_finite: int = 0
    cosine: float | None = None

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """What is demanded of these figures; models that are exact fulfil them with equality."""
        found = []
        if self.top1_agreement is not None:
            least = min(TOP1_BOUND, 1 - 1 / self.rows)
            found.append(
                Bound("top-1 agreement", self.top1_agreement, f"at least {least:.2%}", self.top1_agreement >= least)
            )
        if self.kl is not None:
            found.append(Bound("KL divergence", self.kl, f"at most {KL_BOUND:g}", self.kl <= KL_BOUND))
        if self.cosine is not None:
            holds = self.cosine >= COSINE_BOUND
            found.append(Bound("cosine of features", self.cosine, f"at least {COSINE_BOUND:g}", holds))
        if self.metric is not None and self.reference_metric is not None:
            reach = max(METRIC_BOUND * abs(self.reference_metric), 1 / self.examples)
            same = math.isnan(self.metric) and math.isnan(self.reference_metric)
            holds = same or abs(self.metric - self.reference_metric) <= reach
            demanded = f"{self.reference_metric:.6g} ± {reach:.2g}"
            found.append(Bound("metric", self.metric, demanded, holds))
        return tuple(found)


@dataclass(frozen=True)
class VerificationReport:
    """All checks of one artefact; true where every bound holds. It prints as a table, in Rich and without.

    Attributes:
        artifact: path; target: name of the runtime.
        parameters, graph, replays, sites, outputs: the checks.
        end_to_end: of whole outputs.
        problems: what no check can hold, such as a site that the file does not have.
        unread: sites that the file does not have, for no output depends on them.
        deployment: the outputs as deployed, where looking at codes may change how a runtime computes.
        notes: what holds, and is to be known: that the model itself is not the one that was trained.
    """

    artifact: str
    target: str
    parameters: tuple[ParameterCheck, ...]
    graph: tuple[GraphCheck, ...]
    replays: tuple[ReplayCheck, ...]
    sites: tuple[SiteCheck, ...]
    outputs: tuple[OutputCheck, ...]
    end_to_end: EndToEnd
    problems: tuple[str, ...] = field(default=())
    unread: tuple[str, ...] = field(default=())
    deployment: tuple[DeploymentCheck, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    @property
    def exact(self) -> bool:
        """Whether equality bit for bit is demanded of all codes and outputs, as static integers promise."""
        return all(site.exact for site in self.sites) and all(output.exact for output in self.outputs)

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
        lines += [_parameter_failure(c) for c in self.parameters if not c.holds]
        lines += [
            f"layer {c.name} runs as {c.operator} in {c.arithmetic} arithmetic, not in {c.planned} as planned"
            for c in self.graph
            if not c.holds
        ]
        lines += [_deployment_failure(c) for c in self.deployment if not c.holds]
        lines += [_replay_failure(c) for c in self.replays if not c.holds]
        lines += [
            f"site {c.name}: {c.differing:,} of {c.compared:,} codes differ, by up to {c.max_difference:g}"
            for c in self.sites
            if not c.holds
        ]
        lines += [
            f"{c.name}: {c.differing:,} of {c.compared:,} values differ, by up to {c.max_difference:.3g}"
            for c in self.outputs
            if not c.holds
        ]
        lines += [
            f"{b.name} is {b.measured:.6g}, demanded is {b.demanded}" for b in self.end_to_end.bounds if not b.holds
        ]
        return lines

    def __bool__(self) -> bool:
        return not self.failures

    def to_json(self) -> str:
        """The report as JSON text; a figure that is NaN or infinite is null."""
        data = {**asdict(self), "holds": bool(self), "exact": self.exact, "failures": self.failures}
        return json.dumps(_finite(data), indent=1, allow_nan=False)

    def table(self) -> Table:
        """The checks as one Rich table, up to 100 columns wide."""
        return report_table(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from printed(self)

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _parameter_failure(check: ParameterCheck) -> str:
    if check.missing:
        return f"stored tensor {check.name} is not in the file"
    return f"stored tensor {check.name}: {check.differing:,} of {check.compared:,} entries differ"


def _replay_failure(check: ReplayCheck) -> str:
    what, unit = ("codes", "codes") if check.of_codes else ("values", "of the largest")
    bound = "0" if check.bound == 0 else f"{check.bound:g} relative"
    return (
        f"operation {check.name}: {check.differing:,} of {check.compared:,} {what} differ on the runtime's own inputs, "
        f"by up to {check.max_difference:.3g} {unit} (bound {bound})"
    )


def _deployment_failure(check: DeploymentCheck) -> str:
    return (
        f"{check.name}: {check.differing:,} of {check.compared:,} values differ between the artefact as it is deployed "
        "and the same with its quantised tensors as outputs, by up to "
        f"{check.max_difference:.3g} of the largest (bound {check.bound:g}): the runtime fuses what it then does not, "
        "and its codes are not those that were compared"
    )


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
