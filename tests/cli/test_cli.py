"""Every command does what its help says; bad input is one clear message and an exit code."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from isogrid.cli import app, main
from isogrid.cli.app import app as application
from isogrid.planning.plan import Plan
from tests.targets.test_tensorrt_rules import UNSIGNED, network

RECIPE = """\
model: tests.recipes.tiny:model
data: tests.recipes.tiny:data
scheme: w4a8
rules:
  - match: "4"
    keep: float
training:
  steps: 3
  batch_size: 8
"""
COMMANDS = ("quickstart", "run", "plan", "search", "export", "verify", "inspect", "recover")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    result = CliRunner().invoke(app, ["run", str(recipe), "--set", f"output={folder / 'out'}"])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    return folder / "out"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and stderr of the real entry point."""
    monkeypatch.setattr(sys, "argv", ["isogrid", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    code = caught.value.code
    assert isinstance(code, int)
    return code, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert f"Example: isogrid {command}" in plain


def test_every_command_is_tested_here() -> None:
    assert {command.callback.__name__ for command in application.registered_commands} == set(COMMANDS)  # type: ignore[union-attr]


def test_help_comes_without_torch() -> None:
    code = "import sys; sys.argv = ['isogrid', '--help']\nfrom isogrid.cli import main\n" \
           "try: main()\nfinally: print('torch' in sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("isogrid")


@pytest.mark.parametrize("arguments", [["no-such-command"], ["run"], ["run", "a", "b"], ["quickstart", "--seed", "x"]])
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fails(arguments, capsys, monkeypatch)[0] == 2


def test_plan_shows_what_is_quantised_and_what_is_not(tmp_path: Path) -> None:
    recipe, target = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    recipe.write_text(RECIPE)
    result = CliRunner().invoke(app, ["plan", str(recipe), "--json", str(target)])
    assert result.exit_code == 0, result.output
    assert "int4/channel" in result.output
    plan = Plan.from_json(target.read_text())
    assert [name for name, _ in plan.floats] == ["4"]
    assert CliRunner().invoke(app, ["inspect", str(target)]).exit_code == 0


def test_search_prints_rules_that_a_recipe_takes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.replace('rules:\n  - match: "4"\n    keep: float\n', "")
    recipe.write_text(text)
    formats = ["--format", "int2/channel", "--format", "int8/channel"]
    result = CliRunner().invoke(app, ["search", str(recipe), "--budget", "12", *formats])
    assert result.exit_code == 0, result.output
    recipe.write_text(text + result.output)
    shown = CliRunner().invoke(app, ["plan", str(recipe)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "int8/channel" in shown.output and "int2/channel" in shown.output


def test_verify_holds_and_writes_its_report(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["verify", str(trained / "model.onnx"), "--json", str(target)])
    assert result.exit_code == 0, result.output
    assert "Everything holds." in result.output
    assert json.loads(target.read_text())["holds"]


def test_verify_fails_where_the_artefact_is_of_another_model(trained: Path, copy: Path) -> None:
    recipe = json.loads((copy / "recipe.json").read_text())
    recipe["output"] = str(copy)
    (copy / "recipe.json").write_text(json.dumps(recipe))
    other = copy.parent / "recipe.yaml"
    other.write_text(RECIPE)
    again = CliRunner().invoke(
        app, ["run", str(other), "--restart", "--set", f"output={copy}", "--set", "training.seed=1"]
    )
    assert again.exit_code == 0, again.output
    result = CliRunner().invoke(app, ["verify", str(trained / "model.onnx"), "--run", str(copy)])
    assert result.exit_code == 1
    assert "fails: " in result.output


def test_export_writes_the_same_codes_again(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "again.onnx"
    result = CliRunner().invoke(app, ["export", str(trained), "--output", str(target)])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["verify", str(target), "--run", str(trained)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["model.onnx", "checkpoint", "", "model.onnx.json"])
def test_inspect_shows_formats_and_what_is_float(trained: Path, name: str) -> None:
    result = CliRunner().invoke(app, ["inspect", str(trained / name)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "int4/channel" in result.output
    assert "rule '4'" in result.output
    assert ("█" in result.output) == (name != "model.onnx.json")
    assert ("What onnxruntime multiplies" in result.output) == (name == "model.onnx")


def test_inspect_shows_what_is_in_an_onnx_file_that_nobody_vouches_for(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "foreign.onnx"
    file.write_bytes((trained / "model.onnx").read_bytes())
    result = CliRunner().invoke(app, ["inspect", str(file)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for expected in ("an ONNX model without a sidecar", "█", "Quantised tensors", "uint8", "onnxruntime multiplies"):
        assert expected in result.output
    file.write_text("nothing of the kind")
    result = CliRunner().invoke(app, ["inspect", str(file)])
    assert result.exit_code == 1
    assert "is no ONNX model" in str(result.exception)


def test_weight_only_codes_are_unpacked(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.replace("w4a8", "w4a16").replace("tiny:model", "tiny:wide_model").replace(chr(34) + "4", chr(34) + "1")
    )
    result = CliRunner().invoke(app, ["run", str(recipe), "--set", f"output={tmp_path / 'out'}"])
    assert result.exit_code == 0, result.output
    lines = {}
    for name in ("model.onnx", "checkpoint"):
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out" / name)], env={"COLUMNS": "160"})
        lines[name] = [line for line in result.output.splitlines() if "█" in line]
    assert lines["model.onnx"] == lines["checkpoint"] != []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory."),
        (["run", "digits-w4a9"], "Did you mean 'digits-w4a8'?"),
        (["run", "digits-w4a8", "--set", "training.epocs=3"], "unknown key. Did you mean 'epochs'?"),
        (["run", "digits-w4a8", "--resume", "--restart", "--set", "output=x"], "Give --resume or --restart, not both."),
        (["plan", "digits-w4a8", "--set", "target=onnxruntme"], "Did you mean 'onnxruntime'"),
        (["inspect", "nowhere.onnx"], "There is no file nowhere.onnx."),
        (["inspect", "."], ". holds no checkpoint"),
        (["export", "."], ". is no folder of a run"),
        (["export", "digits-w4a8"], "digits-w4a8 has not been trained in runs/digits-w4a8 yet. Run: isogrid run"),
        (["verify", "nowhere.onnx"], "There is no file nowhere.onnx."),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, error = fails(arguments, capsys, monkeypatch)
    assert code == 1
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_artefact_is_named(
    command: str, size: int, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copy / "model.onnx"
    file.write_bytes(file.read_bytes()[:size])
    code, error = fails([command, str(file)], capsys, monkeypatch)
    assert code == 1
    assert "model.onnx is corrupt or truncated" in error


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json"])
@pytest.mark.parametrize("name", ["model.onnx.json", "checkpoint/checkpoint.json", "recipe.json"])
def test_a_broken_json_file_is_named(
    name: str, content: str, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / name).write_text(content)
    code, error = fails(["verify", str(copy / "model.onnx")], capsys, monkeypatch)
    assert code == 1
    assert name in error


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, blocked = tmp_path / "recipe.yaml", tmp_path / "file"
    recipe.write_text(RECIPE)
    blocked.write_text("in the way")
    code, error = fails(["run", str(recipe), "--set", f"output={blocked / 'out'}"], capsys, monkeypatch)
    assert code == 1
    assert str(blocked) in error


def test_a_file_that_breaks_a_runtimes_rules_is_exit_code_1(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    onnx.save(network(), good)
    onnx.save(network(UNSIGNED), bad)
    fine = CliRunner().invoke(app, ["inspect", "--lint", "tensorrt", str(good)])
    assert fine.exit_code == 0
    assert "nothing by the rules of tensorrt" in fine.output
    broken = CliRunner().invoke(app, ["inspect", "--lint", "tensorrt", str(bad)])
    assert broken.exit_code == 1
    assert "UINT8" in broken.output  # the table is as wide as the terminal, so that longer texts may be broken


def test_linting_what_cannot_be_linted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.onnx"
    file.write_bytes(b"no model")
    for arguments, message in (
        (["tensorrt", str(tmp_path / "missing.onnx")], "There is no file"),
        (["tensorrt", str(file)], "is no ONNX model"),
        (["tensort", str(file)], "Did you mean 'tensorrt'?"),
    ):
        code, said = fails(["inspect", "--lint", *arguments], capsys, monkeypatch)
        assert code == 1
        assert message in said
