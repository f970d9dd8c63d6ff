"""The example on images runs from beginning to end, on images made here."""

import io
import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar10.py"


def made(folder: Path, split: str, count: int) -> None:
    """JPEG files one after another, as the example reads them."""
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(count)
    files = []
    for _ in range(count):
        stream = io.BytesIO()
        image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(stream, "JPEG")
        files.append(np.frombuffer(stream.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    labels = random.integers(0, 10, count, np.uint8)
    np.savez(folder / f"cifar10_{split}.npz", jpeg=np.concatenate(files), offsets=offsets, labels=labels)


def test_cifar10_gives_the_same_predictions_in_the_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, "train", 60)
    made(tmp_path, "test", 50)
    small = ["--images", "60", "--test-images", "50", "--steps", "4", "--width", "4"]
    small += ["--schemes", "W4A8", "--targets", "onnxruntime"]
    main = runpy.run_path(str(EXAMPLE))["main"]
    main.__globals__["BLOCKS"] = 1
    assert main(["--data", str(tmp_path), "--output", str(tmp_path / "out"), *small]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "W4A8" in line and "onnxruntime" in line)
    assert [cell.strip() for cell in row.split("│")][4] == "0"
    assert (tmp_path / "out" / "resnet-onnxruntime-W4A8.model").is_file()
