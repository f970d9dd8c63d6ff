"""The quickstart in small: one scheme, one epoch. `make quickstart` runs all of it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isogrid.cli import app
from isogrid.recipes import quickstart as module
from isogrid.recipes.quickstart import quickstart

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


def test_the_quickstart_proves_what_it_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECIPES", ("digits-ternary-a8",))
    result = quickstart(tmp_path, seed=1, settings=["training.epochs=1", "float_training.epochs=1"])
    assert result.failures == ()
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["float", "float-extra", "ptq", "qat"]
    assert all(list(row) == FIELDS and Path(row["artifact"]).is_file() for row in rows)
    assert all(row["size_bytes"] == Path(row["artifact"]).stat().st_size for row in rows)
    for row in rows[2:]:
        assert (row["differing_codes"], row["logits_equal"]) == (0, True)
        assert row["compared_codes"] > 599 * 64
        assert row["size_bytes"] < rows[0]["size_bytes"] / 2
    assert "</html>" in (tmp_path / "report.html").read_text()
    verified = CliRunner().invoke(app, ["verify", rows[3]["artifact"]])
    assert verified.exit_code == 0, verified.output
