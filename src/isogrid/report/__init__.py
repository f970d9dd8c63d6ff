"""Floor 7: what a run did, as one HTML page that opens offline, as JSON, and as a table in the terminal."""

from isogrid.report.building import model_report, result_row
from isogrid.report.data import (
    BoundRow,
    Fidelity,
    FloatRow,
    GraphRow,
    LanguageFigures,
    LayerStatistics,
    ModelReport,
    PlanRow,
    ReplayRow,
    Report,
    ResultRow,
    ScaleSummary,
    SiteRow,
)
from isogrid.report.page import render_report, write_report
from isogrid.report.results import results_json, results_table, write_results
from isogrid.report.statistics import layer_statistics

__all__ = [
    "BoundRow",
    "Fidelity",
    "FloatRow",
    "GraphRow",
    "LanguageFigures",
    "LayerStatistics",
    "ModelReport",
    "PlanRow",
    "ReplayRow",
    "Report",
    "ResultRow",
    "ScaleSummary",
    "SiteRow",
    "layer_statistics",
    "model_report",
    "render_report",
    "result_row",
    "results_json",
    "results_table",
    "write_report",
    "write_results",
]
