"""The report: true or false, in words, as JSON and as a table."""

import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from isogrid.verification.report import (
    EndToEnd,
    GraphCheck,
    OutputCheck,
    ParameterCheck,
    ReplayCheck,
    SiteCheck,
    VerificationReport,
)

GOOD = VerificationReport(
    artifact="runs/quickstart/w4a8.onnx",
    target="onnxruntime",
    parameters=(ParameterCheck("conv.weight", 72, 0),),
    graph=(GraphCheck("conv", "QLinearConv", "integer", "integer", 4608),),
    replays=(ReplayCheck("conv.output", "QLinearConv", 64, 0, 0.0, 0.0, of_codes=True),),
    sites=(SiteCheck("conv.output", 64, 0, 0.0),),
    outputs=(OutputCheck("output", 10, 0, 0.0),),
    end_to_end=EndToEnd(100, True, 0.0, 1.0, 0.0, 0.9, 0.9, rows=100),
)

BAD = {
    "parameters": (ParameterCheck("conv.weight", 72, 3), "stored tensor conv.weight: 3 of 72 entries differ"),
    "graph": (
        GraphCheck("conv", "FusedConv", "float", "integer", 4608),
        "layer conv runs as FusedConv in float arithmetic, not in integer as planned",
    ),
    "replays": (
        ReplayCheck("conv.output", "QLinearConv", 64, 2, 1.0, 0.0, of_codes=True),
        "operation conv.output: 2 of 64 codes differ on the runtime's own inputs, by up to 1 codes (bound 0)",
    ),
    "sites": (SiteCheck("conv.output", 64, 2, 1.0), "site conv.output: 2 of 64 codes differ, by up to 1"),
    "outputs": (OutputCheck("output", 10, 1, 0.25), "output: 1 of 10 values differ, by up to 0.25"),
}


def test_a_report_without_failures_is_true() -> None:
    assert GOOD and GOOD.failures == [] and GOOD.exact
    assert (GOOD.compared_codes, GOOD.differing_codes) == (64, 0)
    assert "runs/quickstart/w4a8.onnx in onnxruntime: holds" in str(GOOD)


@pytest.mark.parametrize("name", BAD)
def test_each_check_alone_makes_it_false_and_is_said(name: str) -> None:
    check, line = BAD[name]
    report = replace(GOOD, **{name: (check,)})  # type: ignore[arg-type]
    assert not report and report.failures == [line]
    assert f"FAILS: {line[:60]}" in str(report)


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (EndToEnd(100, False, 1.0, 0.98, 0.0, rows=100), "top-1 agreement is 0.98, demanded is at least 99.00%"),
        (EndToEnd(100, False, 1.0, 1.0, 0.01, rows=100), "KL divergence is 0.01, demanded is at most 0.001"),
        (EndToEnd(100, False, 1.0, cosine=0.98, rows=100), "cosine of features is 0.98, demanded is at least 0.99"),
        (EndToEnd(100, False, 1.0, metric=0.8, reference_metric=0.9), "metric is 0.8, demanded is 0.9 ± 0.01"),
        (EndToEnd(100, False, 1.0, metric=math.nan, reference_metric=0.9), "metric is nan, demanded is 0.9 ± 0.01"),
    ],
)
def test_figures_of_the_whole_model_have_bounds(end: EndToEnd, line: str) -> None:
    report = replace(GOOD, end_to_end=end)
    assert not report and report.failures == [line]


def test_one_example_may_disagree_and_float_differences_within_the_bound_hold() -> None:
    end = EndToEnd(4, False, 0.1, 0.75, 1e-9, math.nan, math.nan, rows=4)
    report = replace(
        GOOD,
        end_to_end=end,
        replays=(ReplayCheck("fc.output", "MatMulNBits", 64, 60, 9e-7, 1e-6, of_codes=False),),
        sites=(SiteCheck("fc.input", 64, 3, 1.0, exact=False),),
        outputs=(OutputCheck("output", 10, 9, 0.1, exact=False),),
    )
    assert report and not report.exact and report.differing_codes == 3


def test_the_cause_stands_before_its_consequences() -> None:
    report = replace(
        GOOD, problems=("site a: the artefact does not quantise it",), **{n: (c,) for n, (c, _) in BAD.items()}
    )  # type: ignore[arg-type]
    assert report.failures == ["site a: the artefact does not quantise it", *(line for _, line in BAD.values())]
    assert str(report).index("FAILS: site a") < str(report).index("then: stored tensor")


def test_many_failures_are_cut_short_in_print_but_not_in_the_list() -> None:
    report = replace(GOOD, sites=tuple(SiteCheck(f"layer{n}.output", 8, 1, 1.0) for n in range(40)))
    assert len(report.failures) == 40
    assert "and 28 more, see report.failures" in str(report)


def test_json_holds_everything_and_nothing_that_is_no_json() -> None:
    report = replace(
        GOOD, outputs=(OutputCheck("output", 10, 1, math.inf),), end_to_end=EndToEnd(1, False, math.inf, kl=math.nan)
    )
    text = report.to_json()
    assert "NaN" not in text and "Infinity" not in text
    data = json.loads(text)
    assert data["outputs"][0]["max_difference"] is None and data["end_to_end"]["kl"] is None
    assert data["holds"] is False and data["failures"] == report.failures
    assert data["sites"] == [
        {"name": "conv.output", "compared": 64, "differing": 0, "max_difference": 0.0, "exact": True}
    ]


@pytest.mark.parametrize("path", ["m.onnx", "a/very/long/path/" * 12 + "model.onnx", "[red]not markup[/red].onnx"])
def test_it_prints_in_a_hundred_columns(path: str) -> None:
    bad = replace(GOOD, artifact=path, **{n: (c,) for n, (c, _) in BAD.items()})  # type: ignore[arg-type]
    for report in (replace(GOOD, artifact=path), bad):
        assert max(map(len, str(report).splitlines())) <= 100
        assert path in str(report).replace("\n", "")
        console = Console(width=60, record=True, force_terminal=True)
        with console.capture() as capture:
            console.print(report)
        assert capture.get()
