"""Small models, prepared, exported and ready to be verified."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import isogrid as ig
from isogrid.files import digest
from isogrid.targets import Artifact


class Residual(nn.Module):
    """Batch norm, a residual addition, concatenation, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = torch.relu(x + self.conv(x))
        return self.head(torch.cat([x, y], 1).mean((2, 3)))


class Mixed(nn.Module):
    """Integer layers on both sides of float arithmetic: layer norm, attention, a Linear that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.query = nn.Linear(8, 8)
        self.kept = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(torch.relu(self.conv(x)).flatten(2).transpose(1, 2))
        query = self.query(tokens)
        attention = torch.softmax(query @ query.transpose(1, 2) / 3, -1)
        return self.head(F.gelu(self.kept(attention @ query)))


class Tokens(nn.Module):
    """Embeddings, layer norm and two linear layers, one without bias."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(50, width)
        self.up = nn.Linear(width, 128)
        self.norm = nn.LayerNorm(128)
        self.down = nn.Linear(128, 20, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.down(self.norm(F.gelu(self.up(self.words(words)))))


def exported(
    model: nn.Module, inputs: tuple[Any, ...], path: Path, *, scheme: str = "w8a8", rules: Sequence[ig.Rule] = ()
) -> tuple[nn.Module, Artifact]:
    """A model that is planned, prepared, calibrated on its inputs and exported."""
    ig.prepare(model, ig.plan(model, scheme=scheme, rules=rules, example_inputs=inputs))
    ig.calibrate(model, [inputs])
    return model, ig.export(model, path)


def edited(artifact: Artifact, edit: Callable[[onnx.ModelProto], None], path: Path) -> Path:
    """A changed copy of an artefact, signed as if it were whole."""
    model = onnx.load(artifact.path)
    edit(model)
    onnx.save(model, path)
    sidecar = json.loads(Path(f"{artifact.path}.json").read_text())
    Path(f"{path}.json").write_text(json.dumps({**sidecar, "sha256": digest(path)}))
    return path


def change(name: str, index: int = 0, by: float = 1) -> Callable[[onnx.ModelProto], None]:
    """An edit of one entry of one initialiser."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor)
        wide = array.astype("float64").reshape(-1)
        wide[index] += by
        tensor.CopyFrom(numpy_helper.from_array(wide.reshape(array.shape).astype(array.dtype), name))

    return edit
