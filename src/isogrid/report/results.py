"""The rows of results as JSON for programs and as a table for the terminal."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from isogrid.report import words
from isogrid.report.data import ResultRow, speed_up
from isogrid.report.writing import write_text


def results_json(rows: Sequence[ResultRow]) -> str:
    """The rows as JSON: an object with the list `rows`, each with the fields of `ResultRow` by name.

    >>> print(results_json([ResultRow("CNN", "float", 0.5)])[:56])
    {
      "rows": [
        {
          "name": "CNN",
          "method":
    """
    return json.dumps({"rows": [asdict(row) for row in rows]}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_results(rows: Sequence[ResultRow], path: str | os.PathLike[str]) -> Path:
    """Write `results_json` to a file; the file is whole or not there.

    Raises:
        IsogridError: the file could not be written; what was there before is untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_results([], Path(folder) / "result.json").name
    'result.json'
    """
    return write_text(path, results_json(rows))


def results_table(rows: Sequence[ResultRow]) -> Table:
    """The rows for the terminal; it fits in 80 columns.

    >>> [column.header for column in results_table([]).columns][:2]
    ['model', 'method']
    """
    if any(row.language is not None for row in rows):
        return _language_table(rows)
    table = _table("accuracy\n%", "size\n", "latency\nms", "vs\nfloat", "differing\n/ compared")
    table.add_column("logits\nequal")
    for row in rows:
        table.add_row(
            Text(row.name, style="bold" if row.method == "qat" else ""),
            row.method,
            words.percent(row.accuracy),
            words.size(row.size_bytes),
            words.milliseconds(row.latency_ms),
            words.times(speed_up(row, rows)),
            _codes(row),
            _verdict(words.yes(row.logits_equal), row.logits_equal),
        )
    return table


def _table(*figures: str) -> Table:
    """Without rows: model, method and columns of figures."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("model")
    table.add_column("method")
    for label in figures:
        table.add_column(label, justify="right")
    return table


def _language_table(rows: Sequence[ResultRow]) -> Table:
    """The rows of language models; an interval of perplexities is nearly symmetric, and its halves fit."""
    table = _table(
        "perplexity\n± 95 %", "as\ntrained", "agree\n%", "size\n", "prompt\ntokens/s", "decoding\ntokens/s"
    )
    for row in rows:
        found = row.language
        if found is not None:
            table.add_row(
                Text(row.name, style="bold" if row.method == "qat" else ""),
                row.method,
                f"{found.perplexity:.2f} ± {(found.high - found.low) / 2:.2f}",
                words.MISSING if found.trained_perplexity is None else f"{found.trained_perplexity:.2f}",
                words.MISSING if found.agreement is None else words.percent(found.agreement),
                words.size(row.size_bytes),
                words.whole(None if found.prompt_speed is None else round(found.prompt_speed)),
                words.whole(None if found.decoding_speed is None else round(found.decoding_speed)),
            )
    return table


def _codes(row: ResultRow) -> Text:
    if row.differing_codes is None and row.compared_codes is None:
        return Text(words.MISSING, style="dim")
    return _verdict(f"{words.whole(row.differing_codes)} / {words.rounded(row.compared_codes)}", row.exact)


def _verdict(text: str, holds: bool | None) -> Text:
    return Text(text, style="dim" if holds is None else "green" if holds else "bold red")
