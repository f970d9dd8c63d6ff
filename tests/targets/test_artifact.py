"""An artefact and its sidecar belong together, whatever happens."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid import files
from isogrid.errors import ArtifactError, MissingExtraError, TargetError
from isogrid.planning.plan import Plan
from isogrid.targets import TARGETS as targets
from isogrid.targets import Artifact, Entry, load_artifact, read_artifact, target_from_name
from isogrid.targets.artifact import FORMAT, sidecar_path, write_artifact


@pytest.fixture(scope="module")
def plan() -> Plan:
    model = nn.Sequential(nn.Linear(4, 4))
    return ig.plan(model, example_inputs=(torch.zeros(1, 4),))


def written(path: Path, plan: Plan, content: bytes = b"first") -> Artifact:
    artifact = Artifact(path, "onnxruntime", {"option": "1"}, plan, {"isogrid": "0"}, sha256="")
    return write_artifact(artifact, lambda temporary: temporary.write_bytes(content))


def test_what_is_written_is_read_back(tmp_path: Path, plan: Plan) -> None:
    artifact = written(tmp_path / "new" / "model.onnx", plan)
    assert read_artifact(artifact.path) == artifact
    assert read_artifact(str(artifact.path)) == artifact
    assert artifact.size_bytes == 5
    assert written(artifact.path, plan, b"second") == read_artifact(artifact.path)
    assert "previous" not in json.loads(sidecar_path(artifact.path).read_text())
    assert sorted(path.name for path in artifact.path.parent.iterdir()) == ["model.onnx", "model.onnx.json"]


def fails_on(number: int) -> Callable[[Path, Path], None]:
    """A rename that fails the n-th time, as a crash, a full disk or a pulled plug does."""
    calls = 0
    rename = files.rename

    def failing(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(28, "No space left on device")
        rename(source, target)

    return failing


@pytest.mark.parametrize("step", [1, 2])
def test_a_crash_while_exporting_leaves_the_previous_pair_whole(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    before = written(tmp_path / "model.onnx", plan)
    monkeypatch.setattr(files, "rename", fails_on(step))
    with pytest.raises(ArtifactError, match=r"No space left on device.*untouched"):
        written(before.path, plan, b"second")
    monkeypatch.undo()
    assert before.path.read_bytes() == b"first"
    assert read_artifact(before.path) == before
    after = written(before.path, plan, b"third")
    assert read_artifact(before.path) == after


def test_a_crash_after_both_files_are_replaced_leaves_the_new_pair_whole(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "model.onnx", plan).path
    monkeypatch.setattr(files, "rename", fails_on(3))
    after = written(path, plan, b"second")
    monkeypatch.undo()
    assert read_artifact(path) == after
    assert "previous" in json.loads(sidecar_path(path).read_text())
    third = written(path, plan, b"third")
    assert read_artifact(path) == third


def test_a_full_disk_while_the_file_is_written_changes_nothing(tmp_path: Path, plan: Plan) -> None:
    before = written(tmp_path / "model.onnx", plan)

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"sec")
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="No space left on device"):
        write_artifact(before, write)
    assert read_artifact(before.path) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Cannot write to"):
        written(tmp_path / "file" / "model.onnx", plan)


def test_a_missing_file_or_sidecar_is_said(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(ArtifactError, match=r"no file .*Write one with isogrid\.export"):
        read_artifact(tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match=r"no sidecar isogrid\.json"):  # an artefact may be a folder
        read_artifact(tmp_path)
    path = written(tmp_path / "model.onnx", plan).path
    sidecar_path(path).unlink()
    with pytest.raises(ArtifactError, match=r"no sidecar model\.onnx\.json.*Copy both, or export again"):
        read_artifact(path)


@pytest.mark.parametrize("content", [b"", b"fir", b"firsu", b"first "])
def test_a_corrupt_or_truncated_file_is_said(tmp_path: Path, plan: Plan, content: bytes) -> None:
    path = written(tmp_path / "model.onnx", plan).path
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="corrupt or truncated: its digest is not the one"):
        read_artifact(path)


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda data: {key: value for key, value in data.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        *map(drop, ["format", "target", "session_options", "versions", "sha256", "plan"]),
        lambda data: [data],
        lambda data: None,
        lambda data: {**data, "format": "1"},
        lambda data: {**data, "plan": []},
        lambda data: {**data, "plan": {**data["plan"], "sites": [{}]}},
        lambda data: {**data, "plan": {**data["plan"], "scopes": []}},
        lambda data: {**data, "session_options": ["a"]},
        lambda data: {**data, "sha256": "0", "previous": 3},
    ],
)
def test_a_corrupt_sidecar_is_said(tmp_path: Path, plan: Plan, change: Callable[[Any], Any]) -> None:
    path = written(tmp_path / "model.onnx", plan).path
    sidecar = sidecar_path(path)
    sidecar.write_text(json.dumps(change(json.loads(sidecar.read_text()))))
    with pytest.raises(ArtifactError, match=r"model\.onnx\.json is corrupt or truncated.*Export again"):
        read_artifact(path)
    assert read_artifact(written(path, plan, b"again").path)


@pytest.mark.parametrize("length", [0, 10, 200, -1])
def test_a_truncated_sidecar_is_said(tmp_path: Path, plan: Plan, length: int) -> None:
    path = written(tmp_path / "model.onnx", plan).path
    sidecar = sidecar_path(path)
    sidecar.write_bytes(sidecar.read_bytes()[:length])
    with pytest.raises(ArtifactError, match="corrupt or truncated"):
        read_artifact(path)
    sidecar.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="corrupt or truncated"):
        read_artifact(path)


def rewritten(path: Path, **fields: Any) -> None:
    sidecar = sidecar_path(path)
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **fields}))


def test_a_newer_format_asks_for_a_newer_isogrid(tmp_path: Path, plan: Plan) -> None:
    path = written(tmp_path / "model.onnx", plan).path
    rewritten(path, format=FORMAT + 1)
    with pytest.raises(ArtifactError, match=r"newer Isogrid \(format 2\). Upgrade Isogrid"):
        read_artifact(path)


def test_an_artefact_for_another_target_is_said(tmp_path: Path, plan: Plan) -> None:
    path = written(tmp_path / "model.onnx", plan).path
    rewritten(path, target="toaster")
    with pytest.raises(ArtifactError, match=r"is for the target 'toaster'.*Known: onnxruntime"):
        load_artifact(path)
    with pytest.raises(ArtifactError, match=r"is for toaster, not for onnxruntime"):
        target_from_name("onnxruntime").load(path)
    with pytest.raises(TargetError, match=r"Unknown target 'onnx-runtime'. Did you mean 'onnxruntime'"):
        target_from_name("onnx-runtime")


def test_a_signed_file_that_is_no_model_is_said(tmp_path: Path, plan: Plan) -> None:
    path = written(tmp_path / "model.onnx", plan, b"no protobuf").path
    with pytest.raises(TargetError, match="cannot load"):
        load_artifact(path)


def test_without_onnxruntime_everything_imports_and_the_target_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name in [name for name in sys.modules if name.startswith("isogrid.targets.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"needs the package onnxruntime, which is not installed.*pip install"):
        ig.plan(nn.Linear(4, 4), example_inputs=(torch.zeros(1, 4),))


def test_importing_isogrid_imports_no_runtime() -> None:
    code = "import sys, isogrid; print([m for m in ('onnxruntime', 'onnx', 'gguf', 'torchao') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_target_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets, "toaster", Entry("a_package_that_nobody_has", "Toaster", "isogrid[toaster]"))
    with pytest.raises(
        MissingExtraError, match=r"toaster needs the package a_package.*pip install 'isogrid\[toaster\]'"
    ):
        target_from_name("toaster")
