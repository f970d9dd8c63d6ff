"""A verification report in the terminal."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from isogrid.verification.report import VerificationReport

SHOWN_FAILURES = 12
"""More than these say nothing new: the first is the cause."""


def printed(report: "VerificationReport") -> Iterator[RenderableType]:
    """The table, and below it what fails, the cause first."""
    yield report_table(report)
    if report.unread:
        yield Text(f"not in the artefact, for no output depends on them: {', '.join(report.unread)}")
    for note in report.notes:
        yield Text(f"NOTE: {note}", style="yellow")
    failures = report.failures
    for number, line in enumerate(failures[:SHOWN_FAILURES]):
        yield Text(f"{'FAILS' if number == 0 else ' then'}: {line}", style="bold red" if number == 0 else "red")
    if len(failures) > SHOWN_FAILURES:
        yield Text(f"   and {len(failures) - SHOWN_FAILURES} more, see report.failures", style="red")


def report_table(report: "VerificationReport") -> Table:
    """The checks, one row a kind."""
    count = len(report.failures)
    verdict = Text("holds", style="bold green") if not count else Text("FAILS", style="bold red")
    title = Text.assemble(Text(report.artifact, overflow="fold"), f" in {report.target}: ", verdict, style="bold")
    table = Table(title=title, title_justify="left", title_style="", caption=_operators(report), caption_justify="left")
    table.add_column("check", max_width=44)
    for column in ("compared", "differing", "demanded"):
        table.add_column(column, justify="right", max_width=22)
    table.add_column("holds")
    for name, checks, demanded in _groups(report):
        if checks:
            compared, differing = (sum(getattr(c, field) for c in checks) for field in ("compared", "differing"))
            _add(table, name, f"{compared:,}", f"{differing:,}", demanded, all(c.holds for c in checks))
    for name, arithmetic in (("integer", "integer"), ("float", "float")):
        checks = [c for c in report.graph if c.planned == arithmetic]
        if any(check.macs or not check.holds for check in checks):
            macs, astray = (sum(c.macs for c in some) for some in (checks, [c for c in checks if not c.holds]))
            _add(table, f"multiplications planned in {name}", f"{macs:,}", f"{astray:,}", "0", _all_hold(checks))
    end = report.end_to_end
    _add(table, "examples", f"{end.examples:,}", "", "", None)
    if end.not_finite:
        _add(table, "rows of scores with NaN or infinity", f"{end.not_finite:,}", "", "", None)
    for bound in end.bounds:
        figure = f"{bound.measured:.2%}" if bound.name == "top-1 agreement" else f"{bound.measured:.4g}"
        _add(table, bound.name, figure, "", bound.demanded, bound.holds)
    return table


def _groups(report: "VerificationReport") -> Iterator[tuple[str, Sequence[Any], str]]:
    yield "stored codes, scales, zero points, biases", report.parameters, "0"
    yield "codes of quantised tensors", [c for c in report.sites if c.exact], "0"
    yield "codes behind float arithmetic", [c for c in report.sites if not c.exact], "reported"
    yield "outputs as deployed, against as looked at", report.deployment, _allowed_apart(report.deployment)
    integer = [c for c in report.replays if c.bound == 0]
    yield "exact operations, replayed", integer, "0"
    codes = [c for c in report.replays if c.bound > 0 and c.of_codes]
    yield "codes of floats, replayed", codes, _allowed(codes)
    values = [c for c in report.replays if c.bound > 0 and not c.of_codes]
    worst = max(values, key=lambda c: c.max_difference / c.bound, default=None)
    found = "" if worst is None else f"{worst.max_difference:.0e} ≤ {worst.bound:.0e}"
    yield "float operations, replayed", values, found
    yield "outputs, bit for bit", [c for c in report.outputs if c.exact], "0"
    yield "outputs behind float arithmetic", [c for c in report.outputs if not c.exact], "reported"


def _allowed(checks: Sequence[Any]) -> str:
    share = max((c.share for c in checks), default=0.0)
    return f"a share of {share:g}" if share else f"0 beyond {_bound(checks)}"


def _allowed_apart(checks: Sequence[Any]) -> str:
    bound = max((c.bound for c in checks), default=0.0)
    return f"up to {bound:.0e}" if bound else "0"


def _bound(checks: Sequence[Any]) -> str:
    return f"{max((c.bound for c in checks), default=0.0):.0e}"


def _all_hold(checks: Sequence[Any]) -> bool:
    return all(check.holds for check in checks)


def _add(table: Table, name: str, compared: str, differing: str, demanded: str, holds: bool | None) -> None:
    verdict = Text("") if holds is None else Text("yes", style="green") if holds else Text("NO", style="bold red")
    table.add_row(name, compared, differing, demanded, verdict)


def _operators(report: "VerificationReport") -> Text:
    """What the runtime really runs, by type."""
    lines = []
    for arithmetic in ("integer", "float"):
        counts = Counter(check.operator for check in report.graph if check.arithmetic == arithmetic)
        if counts:
            lines.append(f"runs in {arithmetic}: " + ", ".join(f"{n} × {name}" for name, n in counts.items()))
    return Text("\n".join(lines))
