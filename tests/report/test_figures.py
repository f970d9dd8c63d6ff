import json
import math

import plotly.graph_objects as go
import pytest
import torch

from isogrid.report import ResultRow, figures, layer_statistics
from isogrid.report.figures import accuracy_figure, layer_figure
from tests.report.examples import HOSTILE, ROWS


def checked(figure):
    """Plotly's own check of every property, after the page's variables got a value."""
    text = json.dumps(figure, allow_nan=False)
    for name in ("ink", "soft", "line", "hair", "accent", "bars", "clipped", "page", "raised"):
        text = text.replace(f"var(--{name})", "#123456")
    assert "var(--" not in text.replace("var(--sans)", "")
    return go.Figure(json.loads(text))


def statistics(grid, shape=(8, 64)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * (max(grid) - min(grid)) / 5
    quantized = weight.round().clamp(min(grid), max(grid))
    return layer_statistics("fc", weight, quantized, grid, "grid", scale=torch.ones(1))


def test_a_point_for_every_row_by_method():
    figure = checked(accuracy_figure(ROWS))
    points = {trace.name: list(trace.x) for trace in figure.data if trace.name}
    assert points == {"float": [161_233], "float + extra training": [161_233], "PTQ": [18_112], "QAT": [18_112]}


def test_a_line_leads_from_ptq_to_qat_of_one_name():
    figure = checked(accuracy_figure([*ROWS, ResultRow("W4A8", "ptq", 0.9, 20_000)]))
    (gains,) = [trace for trace in figure.data if trace.mode == "lines"]
    trained = next(trace for trace in figure.data if trace.name == "QAT")
    assert list(gains.x) == [18_112, 18_112, None]
    assert gains.y[1] == trained.y[0]


@pytest.mark.parametrize("accuracies", [(0.98, 0.97), (1.0, 0.1), (0.0, 0.0), (1.0, 1.0), (0.99, 0.0), (0.9999, 0.1)])
def test_any_accuracies_can_be_drawn(accuracies):
    rows = [ResultRow(f"m{index}", "qat", value, 1000 * (index + 1)) for index, value in enumerate(accuracies)]
    figure = checked(accuracy_figure(rows))
    low, high = figure.layout.yaxis.range
    assert all(low < y < high for trace in figure.data for y in trace.y)


@pytest.mark.parametrize("size", [1, 7, 999, 12_345, 7_000_000_000])
def test_any_size_can_be_drawn(size):
    assert checked(accuracy_figure([ResultRow("CNN", "float", 0.9, size)])).layout.xaxis.ticktext is not None


def test_without_a_size_there_is_no_chart():
    assert accuracy_figure([ResultRow("CNN", "float", 0.9)]) is None
    assert accuracy_figure([]) is None


def test_names_cannot_be_markup_in_a_chart():
    figure = accuracy_figure([ResultRow(HOSTILE, "qat", 0.9, 1000)])
    (trace,) = figure["data"]
    assert "<script" not in trace["text"][0] + trace["customdata"][0]
    assert "%{x}" not in trace["hovertemplate"]


def test_a_small_grid_has_a_line_for_every_value():
    figure = checked(layer_figure(statistics(range(-8, 8))))
    lines = next(trace for trace in figure.data if trace.type == "scatter" and trace.mode == "lines")
    assert list(lines.x)[::3] == list(range(-8, 8))
    assert figure.layout.dragmode is False


def test_unused_grid_values_are_drawn_hollow():
    layer = statistics(range(-8, 8), shape=(4,))
    feet = [trace for trace in checked(layer_figure(layer)).data if trace.type == "scatter" and trace.mode == "markers"]
    drawn = sorted(x for foot in feet for x in foot.x)
    assert drawn == list(range(-8, 8))
    assert list(feet[0].x) == [
        value for value, count in zip(layer.grid_values, layer.grid_counts, strict=True) if count
    ]


def test_a_large_grid_has_ticks_and_can_be_looked_at_closely():
    figure = checked(layer_figure(statistics(range(-128, 128))))
    assert [trace.mode for trace in figure.data if trace.type == "scatter"] == ["markers"]
    assert list(figure.data[-1].x) == list(range(-128, 128))
    assert figure.layout.dragmode == "zoom"


def test_a_huge_grid_is_not_drawn():
    assert {trace.type for trace in checked(layer_figure(statistics(range(5000)))).data} == {"bar"}


def test_shares_add_up_and_clipped_bins_are_marked():
    layer = statistics(range(-2, 2), shape=(64, 64))
    bars, clipped = (trace for trace in checked(layer_figure(layer)).data if trace.type == "bar")
    # Six significant digits are kept of each of about 100 shares.
    assert sum(bars.y) == pytest.approx(100, abs=1e-2)
    assert all(x < -2.5 or x > 1.5 for x in clipped.x)
    assert sum(clipped.y) == pytest.approx(100 * layer.saturation, abs=1e-2)


def test_a_chart_is_small():
    assert len(json.dumps(layer_figure(statistics(range(-128, 128), shape=(512, 512))))) < 12_000


def test_no_weights_no_chart():
    empty = torch.empty(0)
    assert layer_figure(layer_statistics("fc", empty, empty, range(4), "uint2/tensor")) is None


@pytest.mark.parametrize(("smallest", "largest"), [(12_176, 40_671), (9_000, 10_500), (40, 90), (1_000, 3_000_000)])
def test_an_axis_of_sizes_has_ticks_within_its_range(smallest: int, largest: int) -> None:
    sizes, labels = figures._size_ticks([math.log10(smallest), math.log10(largest)])
    assert 4 <= len(sizes) <= 24
    assert all(smallest <= size <= largest for size in sizes)
    assert len(set(labels)) == len(labels)
