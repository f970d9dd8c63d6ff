"""The charts, as plain data for Plotly. A colour `var(--name)` is the page's own and follows its theme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from isogrid.report import words
from isogrid.report.data import LayerStatistics, Method, ResultRow, speed_up

Figure = dict[str, Any]

_LONGEST_GRID_DRAWN = 1024
_LONGEST_GRID_IN_FULL_HEIGHT = 64
_ACCURACY_TICKS = (0, 20, 40, 60, 70, 80, 90, 95, 97, 98, 99, 99.5, 99.7, 99.8, 99.9, 99.95, 99.99)
_MARKS: dict[Method, dict[str, Any]] = {
    "float": {"symbol": "diamond", "size": 11, "color": "var(--ink)"},
    "float-extra": {"symbol": "diamond-open", "size": 11, "color": "var(--ink)", "line": {"width": 1.5}},
    "ptq": {"symbol": "circle-open", "size": 10, "color": "var(--soft)", "line": {"width": 1.75}},
    "qat": {"symbol": "circle", "size": 11, "color": "var(--accent)"},
}
_SIDES: dict[Method, tuple[str, ...]] = {
    "float": ("bottom center", "top center", "middle left", "middle right"),
    "float-extra": ("top center", "bottom center", "middle right", "middle left"),
    "ptq": ("middle right", "middle left", "bottom center", "bottom right", "bottom left"),
    "qat": ("middle right", "top center", "middle left", "bottom right", "top right", "bottom left", "top left"),
}


def accuracy_figure(rows: Sequence[ResultRow]) -> Figure | None:
    """Accuracy against size, a trace a method, and a line from PTQ to QAT of one name; None where no row has a size.

    >>> figure = accuracy_figure([ResultRow("CNN", "float", 0.98, size_bytes=90_000)])
    >>> figure["data"][0]["x"], figure["data"][0]["y"]
    ([90000], [98.0])
    """
    rows = [row for row in rows if row.size_bytes]
    if not rows:
        return None
    x_range, scale = _size_range(rows), _accuracy_scale(rows)
    sides = _label_sides(rows, x_range, scale)
    traces = _gains(rows, scale)
    for method, mark in _MARKS.items():
        members = [(row, side) for row, side in zip(rows, sides, strict=True) if row.method == method]
        if members:
            traces.append(_method_trace(method, mark, members, rows, scale))
    sizes, labels = _size_ticks(x_range)
    layout = _layout(
        height=420,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 13}, "itemwidth": 30},
        margin={"l": 58, "r": 16, "t": 44, "b": 52},
        xaxis=_axis("size of the file", type="log", range=x_range, tickvals=sizes, ticktext=labels),
        yaxis=scale.axis,
    )
    return {"data": traces, "layout": layout}


def layer_figure(layer: LayerStatistics) -> Figure | None:
    """The histogram of a layer's weights with the lines of its grid; None where no weight has a place.

    >>> layer = LayerStatistics("fc", "int2/tensor", (3,), "weight", (1, 2), (0.0, 1.0, 2.0), grid_values=(1.0,))
    >>> [trace["type"] for trace in layer_figure(layer)["data"]]
    ['bar', 'scatter', 'scatter']
    """
    if not layer.histogram_counts:
        return None
    edges = layer.histogram_edges
    total = max(sum(layer.histogram_counts) + layer.below + layer.above, 1)
    shares = [_short(100 * count / total) for count in layer.histogram_counts]
    highest = max(shares) * 1.06 or 1.0
    dense = _LONGEST_GRID_IN_FULL_HEIGHT < len(layer.grid_values) <= _LONGEST_GRID_DRAWN
    layout = _layout(
        height=260,
        barmode="overlay",
        margin={"l": 46, "r": 12, "t": 8, "b": 46},
        dragmode="zoom" if dense else False,
        xaxis=_axis(
            layer.unit,
            range=[_short(edges[0]), _short(edges[-1])],
            showgrid=False,
            layer="below traces",
            fixedrange=not dense,
        ),
        yaxis=_axis("% of weights", range=[0, highest], nticks=5),
    )
    return {"data": [*_bars(layer, shares), *_grid_traces(layer, highest, total)], "layout": layout}


def _bars(layer: LayerStatistics, shares: list[float]) -> list[Figure]:
    """The bins, and over them those that the grid clips in a colour of their own."""
    edges, grid = layer.histogram_edges, layer.grid_values
    width = edges[1] - edges[0]
    centres = [_short(edge + width / 2) for edge in edges[:-1]]
    bars = {
        "type": "bar",
        "x": centres,
        "y": shares,
        "width": _short(width),
        "marker": {"color": "var(--bars)", "line": {"width": 0}},
        "hovertemplate": "%{y:.2f} % of the weights<br>near %{x:.4~g}<extra></extra>",
        "showlegend": False,
    }
    if len(grid) < 2:
        return [bars]
    first, last = grid[0] - (grid[1] - grid[0]) / 2, grid[-1] + (grid[-1] - grid[-2]) / 2
    outside = [index for index, centre in enumerate(centres) if shares[index] and not first < centre < last]
    clipped = {
        **bars,
        "x": [centres[index] for index in outside],
        "y": [shares[index] for index in outside],
        "marker": {"color": "var(--clipped)", "line": {"width": 0}},
        "hovertemplate": "%{y:.2f} % of the weights<br>near %{x:.4~g}, clipped<extra></extra>",
    }
    return [bars, clipped] if outside else [bars]


def _gains(rows: Sequence[ResultRow], scale: "_Scale") -> list[Figure]:
    """One trace of thin lines, each from a PTQ point to the QAT point of the same name."""
    trained = {row.name: row for row in rows if row.method == "qat"}
    pairs = [(row, trained[row.name]) for row in rows if row.method == "ptq" and row.name in trained]
    if not pairs:
        return []
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for one, other in pairs for x in (one.size_bytes, other.size_bytes, None)],
        "y": [y for one, other in pairs for y in (scale.place(one), scale.place(other), None)],
        "line": {"color": "var(--line)", "width": 1.5},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return [line]


def _method_trace(
    method: Method,
    mark: dict[str, Any],
    members: list[tuple[ResultRow, str]],
    rows: Sequence[ResultRow],
    scale: "_Scale",
) -> Figure:
    return {
        "type": "scatter",
        "name": words.METHOD_NAMES[method],
        "mode": "markers+text",
        "x": [row.size_bytes for row, _ in members],
        "y": [scale.place(row) for row, _ in members],
        "text": [_label(row, side) for row, side in members],
        "textposition": [side or "top center" for _, side in members],
        "textfont": {"size": 12, "color": "var(--accent)" if method == "qat" else "var(--soft)"},
        "marker": mark,
        "customdata": [_hover(row, rows) for row, _ in members],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _label(row: ResultRow, side: str) -> str:
    """The name, held off its point by a space."""
    return f"\N{NO-BREAK SPACE}{escape(row.name)}\N{NO-BREAK SPACE}" if side else ""


def _hover(row: ResultRow, rows: Sequence[ResultRow]) -> str:
    lines = [
        f"<b>{escape(row.name)}</b>  {words.METHOD_NAMES[row.method]}",
        f"accuracy {words.percent(row.accuracy)} %",
        f"size {words.size(row.size_bytes)}",
    ]
    if row.latency_ms is not None:
        lines.append(f"latency {words.milliseconds(row.latency_ms)} ms, {words.times(speed_up(row, rows))} of float")
    if row.compared_codes:
        lines.append(f"{words.whole(row.differing_codes)} of {words.whole(row.compared_codes)} codes differ")
    return "<br>".join(lines)


def _grid_traces(layer: LayerStatistics, highest: float, total: int) -> list[Figure]:
    """The lines of the grid: over the whole height, or as short ticks where they would hide the bars."""
    if not layer.grid_values or len(layer.grid_values) > _LONGEST_GRID_DRAWN:
        return []
    counts = layer.grid_counts or (0,) * len(layer.grid_values)
    values = [_short(value) for value in layer.grid_values]
    shares = [_short(100 * count / total) for count in counts]
    base = {
        "type": "scatter",
        "showlegend": False,
        "hovertemplate": "grid value %{x:.4~g}<br>%{customdata:.2f} % of the quantised weights<extra></extra>",
    }
    if len(values) > _LONGEST_GRID_IN_FULL_HEIGHT:
        marker = {"symbol": "line-ns", "size": 8, "line": {"width": 0.6, "color": "var(--accent)"}}
        ticks = {**base, "mode": "markers", "x": values, "y": [0] * len(values), "customdata": shares, "marker": marker}
        return [ticks]
    height = _short(highest)
    lines = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for value in values for x in (value, value, None)],
        "y": [y for _ in values for y in (0, height, None)],
        "line": {"width": 1, "color": "var(--accent)"},
        "opacity": 0.55,
        "hoverinfo": "skip",
        "showlegend": False,
    }
    used = {"symbol": "circle", "size": 6, "color": "var(--accent)"}
    unused = {"symbol": "circle", "size": 6, "color": "var(--page)", "line": {"width": 1.25, "color": "var(--accent)"}}
    feet = [
        {
            **base,
            "mode": "markers",
            "x": [value for value, count in zip(values, counts, strict=True) if bool(count) is taken],
            "y": [0] * sum(bool(count) is taken for count in counts),
            "customdata": [share for share, count in zip(shares, counts, strict=True) if bool(count) is taken],
            "marker": marker,
            "cliponaxis": False,
        }
        for taken, marker in ((True, used), (False, unused))
    ]
    return [lines, *(foot for foot in feet if foot["x"])]


def _layout(**parts: Any) -> Figure:
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "var(--sans)", "size": 12, "color": "var(--soft)"},
        "hoverlabel": {
            "bgcolor": "var(--raised)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)"},
            "align": "left",
        },
        "hovermode": "closest",
        "dragmode": False,
        **parts,
    }


def _axis(title: str, **parts: Any) -> Figure:
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "var(--hair)",
        "linecolor": "var(--line)",
        "tickcolor": "var(--line)",
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "fixedrange": True,
        **parts,
    }


def _size_range(rows: Sequence[ResultRow]) -> list[float]:
    """The range of the axis in powers of ten, as Plotly wants it, with room for labels at both ends."""
    logs = [math.log10(row.size_bytes) for row in rows if row.size_bytes]
    room = max(0.12 * (max(logs) - min(logs)), 0.06)
    return [_short(min(logs) - room), _short(max(logs) + room)]


@dataclass(frozen=True)
class _Scale:
    """The axis of the accuracy, and where on it a row lies."""

    axis: Figure
    by_error: bool

    def place(self, row: ResultRow) -> float:
        return _short(-math.log10(1 - row.accuracy) if self.by_error else 100 * row.accuracy)


def _accuracy_scale(rows: Sequence[ResultRow]) -> _Scale:
    """Linear, or by the logarithm of the error where models lie so far apart that the good ones would run together."""
    low, high = (extreme(row.accuracy for row in rows) for extreme in (min, max))
    if high - low <= 0.05 or high == 1:
        room = max(10 * (high - low), 0.5)
        return _Scale(_axis("test accuracy, %", range=[_short(100 * low - room), _short(100 * high + room)]), False)
    bottom, top = -math.log10(1 - low), -math.log10(1 - high)
    room = 0.1 * (top - bottom)
    ticks = [tick for tick in _ACCURACY_TICKS if bottom - room <= -math.log10(1 - tick / 100) <= top + room]
    axis = _axis(
        "test accuracy, % (log scale of the error)",
        range=[_short(bottom - room), _short(top + room)],
        tickvals=[_short(-math.log10(1 - tick / 100)) for tick in ticks],
        ticktext=[f"{tick:g}" for tick in ticks],
    )
    return _Scale(axis, True)


def _size_ticks(x_range: Sequence[float]) -> tuple[list[int], list[str]]:
    """Round sizes within the range: powers of ten, or finer where fewer than four of them fit."""
    finer = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    for mantissas in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), finer, tuple(tenths / 10 for tenths in range(10, 100))):
        decades = range(math.floor(x_range[0]), math.ceil(x_range[1]))
        sizes = [
            round(mantissa * 10**decade) for decade in decades for mantissa in mantissas if mantissa * 10**decade >= 1
        ]
        inside = [size for size in sizes if x_range[0] <= math.log10(size) <= x_range[1]]
        if len(inside) >= 4:
            break
    return inside, [words.size(size).replace(".00 ", " ").replace(".0 ", " ") for size in inside]


def _label_sides(rows: Sequence[ResultRow], x_range: Sequence[float], scale: _Scale) -> list[str]:
    """On which side of its point each label stands so that none covers another, or "" where there is no room.

    Measured on a chart of usual size. QAT chooses first; the method says which sides are tried, and in which order.
    """
    width, height = 880.0, 320.0
    bottom, top = scale.axis["range"]
    points = [
        (
            width * (math.log10(row.size_bytes or 1) - x_range[0]) / (x_range[1] - x_range[0]),
            height * (scale.place(row) - bottom) / (top - bottom),
        )
        for row in rows
    ]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    sides = [""] * len(rows)
    for index in sorted(range(len(rows)), key=lambda index: -tuple(_MARKS).index(rows[index].method)):
        row, (x, y) = rows[index], points[index]
        length = 7.0 * len(row.name)
        for side in _SIDES[row.method]:
            box = _label_box(side, x, y, length)
            if not any(_overlap(box, other) for other in taken) and box[0] >= 0 and box[2] <= width:
                taken.append(box)
                sides[index] = side
                break
    return sides


Box = tuple[float, float, float, float]


def _label_box(side: str, x: float, y: float, length: float) -> Box:
    vertical, horizontal = side.split()
    left = {"left": x - length - 8, "center": x - length / 2, "right": x + 8}[horizontal]
    bottom = {"top": y + 8, "middle": y - 7, "bottom": y - 22}[vertical]
    return left, bottom, left + length, bottom + 14


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _short(number: float) -> float:
    """Six significant digits: more than a screen shows, and a smaller page."""
    return float(f"{number:.6g}")
