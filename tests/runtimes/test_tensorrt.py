"""NVIDIA's polygraphy reads the files that are written for TensorRT, and runs them in ONNX Runtime."""

import subprocess
from pathlib import Path

import pytest

import isogrid as ig
from isogrid.targets.subprocesses import interpreter_of
from tests.targets.residual_networks import trained

pytestmark = pytest.mark.runtime("tensorrt")


def polygraphy(*arguments: str) -> str:
    start = "import sys; from polygraphy.tools import main; sys.exit(main())"
    command = [interpreter_of("tensorrt"), "-c", start, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_polygraphy_reads_and_runs_a_file(tmp_path: Path) -> None:
    path = ig.export(trained("tensorrt"), tmp_path / "model.onnx").path
    assert "Graph Input(s)" in polygraphy("inspect", "model", str(path))
    assert "PASSED" in polygraphy("run", str(path), "--onnxrt", "--input-shapes", "x:[1,3,12,12]", "--validate")
