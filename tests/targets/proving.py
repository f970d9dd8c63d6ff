"""A model all the way: prepared, trained, converted, exported, run in ONNX Runtime; every bit the same."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.targets.onnx_runtime_session import optimized_graph
from isogrid.targets.onnxruntime import SESSION_OPTIONS
from tests.models import assert_equal, prepared, train


def proven(
    model: nn.Module, inputs: tuple[Tensor, ...], folder: Path, **options: Any
) -> tuple[nn.Module, Counter[str]]:
    """The trained model, and how often ONNX Runtime runs each operator.

    The float output of a model is not compared where float operations on the way may round in any order; then
    verification decides.
    """
    model = prepared(model, inputs, **options)
    train(model, inputs, steps=2, lr=1e-4)
    trained = model.eval()(*inputs)
    assert_equal(ig.convert(model)(*inputs), trained.detach())
    artifact = ig.export(model, folder / "model.onnx")
    report = ig.verify(model, artifact, [inputs])
    assert report, str(report)
    graph = optimized_graph(artifact.path, SESSION_OPTIONS)
    return model, Counter(node.op_type for node in graph.graph.node)


def all_integer(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path, **options: Any) -> Counter[str]:
    """As `proven`, and the outputs of ONNX Runtime are those of training, bit for bit; no product is float."""
    model, operators = proven(model, inputs, folder, **options)
    (output,) = ig.load(folder / "model.onnx")(*inputs)
    assert_equal(output, model(*inputs).detach())
    floats = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "FusedGemm", "Add", "Mul", "Sub", "Einsum"}
    assert not floats & set(operators), operators
    return operators


def stored(path: Path) -> dict[str, Any]:
    """The initialisers of a file, by name."""
    return {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in onnx.load(path).graph.initializer}
