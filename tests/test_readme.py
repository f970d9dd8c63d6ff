"""The Python of the README runs as it stands there."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_of_the_readme_run_and_prove_their_artefact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.randn(32, 1, 8, 8)
    loader = DataLoader(TensorDataset(x, torch.randint(3, (32,))), batch_size=8)
    names = {
        "model": model,
        "x": x[:2],
        "batches": [x],
        "loader": loader,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loss": nn.CrossEntropyLoss(),
    }
    monkeypatch.chdir(tmp_path)
    Path("ten_lines.py").write_text(block)
    runpy.run_path("ten_lines.py", init_globals=names)
    printed = capsys.readouterr().out
    assert "0.weight" in printed
    assert "FAILS" not in printed
    assert (tmp_path / "model.onnx").is_file()
