import json
import os
import re
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs

from isogrid.errors import IsogridError
from isogrid.report import LanguageFigures, ModelReport, Report, ResultRow, render_report, write_report
from tests.report.examples import HOSTILE, ROWS, report

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr", "path"}
FETCHING = {"src", "srcset", "data", "poster", "action", "formaction", "background", "manifest", "xlink:href"}


class Page(HTMLParser):
    """What a browser would see: elements, their text, and whether they are closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.rows = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.texts.setdefault(tag, []).append(data)
        if "td" in self.open or ("th" in self.open and "tr" in self.open):
            self.rows[-1][-1] += data


def test_language_models_have_a_table_of_their_own():
    figures = LanguageFigures(43.95, 42.31, 45.73, 38_912, 43.94, 0.9987, 1923.4, None)
    rows = (
        ResultRow("float", "float", 0.2288, 11_500_000, language=replace(figures, trained_perplexity=None)),
        ResultRow("Q4_0", "qat", 0.2277, 3_450_000, language=figures),
    )
    found = Page(render_report(report(rows=rows))).rows
    assert found[0][2:] == [
        "Perplexity", "95 % interval", "As trained", "Same best token as trained, %", "Right best token, %", "Size",
        "Prompt, tokens/s", "Decoding, tokens/s",
    ]  # fmt: skip
    assert found[1][2:5] == ["43.95", "42.31 to 45.73", "–"]
    assert found[2][2:] == ["43.95", "42.31 to 45.73", "43.94", "99.87", "22.77", "3.45 MB", "1,923", "–"]


@pytest.fixture(scope="module")
def page():
    return Page(render_report(report()))


def test_nothing_is_fetched(page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        assert not FETCHING & set(attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
    (style,) = page.texts["style"]
    assert "url(" not in style and "@import" not in style


def test_the_browser_is_told_to_fetch_nothing(page):
    (policy,) = [part["content"] for tag, part in page.elements if part.get("http-equiv") == "Content-Security-Policy"]
    sources = set(re.findall(r"'[^']+'|\S+:(?=\s|;|$)", policy))
    assert policy.startswith("default-src 'none'")
    assert sources == {"'none'", "'unsafe-inline'", "data:", "blob:"}


def test_plotly_is_inside_once():
    text = render_report(report())
    assert text.count(get_plotlyjs()) == 1
    assert "</script" not in get_plotlyjs()


def test_names_are_text_and_nothing_else():
    text = render_report(report(HOSTILE, (*ROWS, ResultRow(HOSTILE, "qat", 0.5, 1000))))
    hostile, plain = Page(text), Page(render_report(report("plain", (*ROWS, ResultRow("plain", "qat", 0.5, 1000)))))
    tags = [tag for tag, _ in hostile.elements if tag != "wbr"]
    assert tags == [tag for tag, _ in plain.elements if tag != "wbr"]
    assert "alert(" not in "".join(part for part in hostile.texts["script"] if not part.startswith("{"))
    assert HOSTILE in hostile.texts["h1"]
    assert HOSTILE in [cell for row in hostile.rows for cell in row]
    assert "49" not in "".join(hostile.texts["h1"])


def test_charts_are_json(page):
    figures = [json.loads(text) for text in page.texts["script"] if text.startswith("{")]
    assert [sorted(figure) for figure in figures] == [["data", "layout"]] * 2


def test_the_table_of_results(page):
    assert page.rows[1] == ["CNN", "float", "98.33", "–", "161 kB", "0.412", "1.00×", "–", "–", "–"]
    assert page.rows[3] == ["W2A8", "PTQ", "41.39", "−56.94", "18.1 kB", "0.118", "3.49×", "0", "3,412,800", "yes"]
    assert page.rows[4] == ["W2A8", "QAT", "97.50", "−0.83", "18.1 kB", "0.103", "4.00×", "0", "3,412,800", "yes"]


def test_the_tables_of_plan_and_fidelity(page):
    rows = [tuple(row) for row in page.rows]
    assert ("block.conv1", "weight", "int2/channel", "mse", "lsq", "block.conv1") in rows
    assert ("block.conv1", "block.conv1") in rows
    assert ("fc.input", "64", "3", "2") in rows
    assert ("block.conv1", "block.conv1", "640", "0", "0", "0 codes", "yes") in rows
    assert ("block.conv1", "integer", "3", "750", "75.0") in rows
    assert ("block.conv1", "1", "at least 0.999", "yes") in rows


def test_a_failing_site_is_counted_and_shown():
    text = render_report(report())
    assert '<span class="bad">1 failing</span>' in text
    assert '<span class="bad">3</span>' in text


def test_a_row_leads_to_its_details(page):
    identifiers = [part["id"] for _, part in page.elements if "id" in part]
    links = [part["href"] for _, part in page.elements if part.get("href", "").startswith("#")]
    assert links == ["#model-0"]
    assert "model-0" in identifiers
    assert len(identifiers) == len(set(identifiers))


def test_models_of_one_name_have_places_of_their_own():
    twice = replace(report(), models=(ModelReport("W2A8", "qat"), ModelReport("W2A8", "qat")))
    identifiers = [part["id"] for _, part in Page(render_report(twice)).elements if "id" in part]
    assert len(identifiers) == len(set(identifiers))
    assert {"model-0", "model-1", "tab-model-0", "tab-model-1"} <= set(identifiers)


def test_an_empty_report_is_a_page():
    empty = Page(render_report(Report("Nothing", "", "ONNX Runtime", datetime(2026, 1, 31))))
    assert "No model was run." in "".join(empty.texts["p"])
    assert empty.rows == []


def test_one_report_gives_one_page():
    assert render_report(report()) == render_report(report())


def test_the_file_holds_the_page(tmp_path):
    path = write_report(report("Größe"), tmp_path / "runs" / "report.html")
    assert path.read_text(encoding="utf-8") == render_report(report("Größe"))


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(IsogridError, match="Permission denied"):
        write_report(report(), path)
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["report.html"]
