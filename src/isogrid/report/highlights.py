"""The few figures at the top of the page, chosen from the rows of results."""

from collections.abc import Sequence
from dataclasses import dataclass

from isogrid.report import words
from isogrid.report.data import ResultRow, speed_up


@dataclass(frozen=True)
class Highlight:
    """A figure, what it is, and what belongs beside it; `holds` says whether it is a promise kept, None if it is none.

    >>> Highlight("Fastest", "3.10×", "W8A8 QAT", None).value
    '3.10×'
    """

    label: str
    value: str
    detail: str
    holds: bool | None


def highlights(rows: Sequence[ResultRow]) -> list[Highlight]:
    """Codes and logits over all rows, the fastest quantised model, and the smallest one with its best accuracy.

    >>> [highlight.label for highlight in highlights([ResultRow("CNN", "qat", 0.9, size_bytes=100)])]
    ['Smallest']
    """
    chosen = []
    compared = sum(row.compared_codes or 0 for row in rows)
    if compared:
        differing = sum(row.differing_codes or 0 for row in rows)
        chosen.append(
            Highlight("Differing codes", words.whole(differing), f"of {words.whole(compared)} compared", differing == 0)
        )
    judged = [row.logits_equal for row in rows if row.logits_equal is not None]
    if judged:
        detail = f"of {words.plural(len(judged), 'model')}, bit for bit"
        chosen.append(Highlight("Logits equal", words.whole(sum(judged)), detail, all(judged)))
    quantised = [row for row in rows if row.method in ("ptq", "qat")]
    timed = [(ratio, row) for row in quantised if (ratio := speed_up(row, rows)) is not None]
    if timed:
        ratio, row = max(timed, key=lambda pair: pair[0])
        chosen.append(Highlight("Fastest, against float", words.times(ratio), _which(row), None))
    sized = [row for row in quantised if row.size_bytes]
    if sized:
        row = min(sized, key=lambda row: (row.size_bytes or 0, -row.accuracy))
        chosen.append(Highlight("Smallest", words.size(row.size_bytes), _which(row), None))
    return chosen


def _which(row: ResultRow) -> str:
    return f"{row.name} {words.METHOD_NAMES[row.method]}, {words.percent(row.accuracy)} %"
