import io
import json
import os
import stat

import pytest
from rich.console import Console

from isogrid.errors import IsogridError
from isogrid.report import ResultRow, results_json, results_table, write_results
from isogrid.report.writing import write_text
from tests.report.examples import ROWS

FIELDS = [
    "name",
    "method",
    "accuracy",
    "size_bytes",
    "latency_ms",
    "differing_codes",
    "compared_codes",
    "logits_equal",
    "artifact",
    "language",
]


def test_json_has_the_fields_by_name():
    read = json.loads(results_json(ROWS))
    assert list(read) == ["rows"]
    assert all(list(row) == FIELDS for row in read["rows"])


def test_json_gives_back_the_same_rows(tmp_path):
    rows = [*ROWS, ResultRow('Größe "ü" </script>', "qat", 0.1 + 0.2, 2**53 + 1, 1e-9, 0, 0, False, "a/b.onnx")]
    path = write_results(rows, tmp_path / "runs" / "result.json")
    read = json.loads(path.read_text(encoding="utf-8"))
    assert [ResultRow(**row) for row in read["rows"]] == rows


def test_no_rows():
    assert json.loads(results_json([])) == {"rows": []}


def printed(rows, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(results_table(rows))
    return console.export_text()


def test_the_table_says_everything_in_80_columns():
    lines = printed(ROWS, 80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    cells = [line.split() for line in lines[3:]]
    assert cells == [
        ["CNN", "float", "98.33", "161", "kB", "0.412", "1.00×", "–", "–"],
        ["CNN", "float-extra", "98.61", "161", "kB", "0.409", "1.01×", "–", "–"],
        ["W2A8", "ptq", "41.39", "18.1", "kB", "0.118", "3.49×", "0", "/", "3.41", "M", "yes"],
        ["W2A8", "qat", "97.50", "18.1", "kB", "0.103", "4.00×", "0", "/", "3.41", "M", "yes"],
    ]


def test_a_name_is_not_markup():
    assert "[red]x[/red]" in printed([ResultRow("[red]x[/red]", "qat", 0.5)], 120)


def test_a_difference_stands_out():
    row = ResultRow("W8A8", "qat", 0.5, differing_codes=1, compared_codes=640, logits_equal=False)
    cells = [next(iter(column.cells)) for column in results_table([row]).columns]
    assert [(cell.plain, cell.style) for cell in cells[-2:]] == [("1 / 640", "bold red"), ("no", "bold red")]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(IsogridError, match="could not be written: No space left on device"):
        write_results(ROWS, path)
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["result.json"]


def test_text_that_cannot_be_encoded_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["page.html"]


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(IsogridError, match=r"result\.json could not be written"):
        write_results(ROWS, tmp_path / "result.json")
    assert [child.name for child in tmp_path.iterdir()] == ["result.json"]


def test_a_written_file_has_the_usual_permissions(tmp_path):
    beside = tmp_path / "beside"
    beside.write_text("")
    path = write_text(tmp_path / "result.json", "{}")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(beside.stat().st_mode)
