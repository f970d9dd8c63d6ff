"""The page: one HTML file with everything in it. It asks the network for nothing, and forbids the browser to."""

import os
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from isogrid.report import words
from isogrid.report.data import Report, speed_up
from isogrid.report.figures import accuracy_figure, layer_figure
from isogrid.report.highlights import highlights
from isogrid.report.writing import write_text


def render_report(report: Report) -> str:
    """The page as HTML.

    >>> from datetime import datetime
    >>> page = render_report(Report("Digits & more", "a small CNN", "ONNX Runtime", datetime(2026, 1, 31)))
    >>> "<h1>Digits &amp; more</h1>" in page
    True
    """
    template = _environment().get_template("report.html")
    return template.render(
        report=report,
        accuracy_figure=accuracy_figure(report.rows),
        layer_figure=layer_figure,
        speed_up=speed_up,
        plotly=Markup(get_plotlyjs()),
        highlights=highlights(report.rows),
        language=all(row.language is not None for row in report.rows),
        keys={(model.name, model.method): f"model-{index}" for index, model in enumerate(report.models)},
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the page to a file; the file is whole or not there.

    Raises:
        IsogridError: the file could not be written; what was there before is untouched.

    >>> import tempfile
    >>> from datetime import datetime
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = Report("Digits", "a small CNN", "ONNX Runtime", datetime(2026, 1, 31))
    ...     write_report(report, Path(folder) / "report.html").name
    'report.html'
    """
    return write_text(path, render_report(report))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("isogrid.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    for word in (
        words.whole, words.figure, words.percent, words.size, words.decibel, words.milliseconds, words.times,
        words.yes, words.shape, words.plural,
    ):  # fmt: skip
        environment.filters[word.__name__] = word
    environment.filters["breakable"] = _breakable
    environment.globals["method_names"] = words.METHOD_NAMES
    return environment


def _breakable(name: str) -> Markup:
    """A qualified name that a narrow column may break after its dots."""
    return escape(name).replace(".", Markup(".<wbr>"))
