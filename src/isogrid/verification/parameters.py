"""Stored tensors: what the file holds against what the model holds."""

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from isogrid.layers.integer import IntegerModule
from isogrid.targets import Artifact
from isogrid.verification.report import ParameterCheck
from isogrid.verification.tally import Tally


def check_parameters(reference: nn.Module, artifact: Artifact) -> tuple[ParameterCheck, ...]:
    """Weight codes, scales, zero points and bias codes, each by its name in the file.

    A zero point or scale that equals another may be stored once, under the other's name; weights never are.

    Args:
        reference: of `isogrid.convert`.
        artifact: an ONNX file.
    """
    stored = {t.name: t for t in onnx.load(artifact.path).graph.initializer}
    checks = []
    for name, expected in _tensors(reference).items():
        if name in stored:
            tally = Tally()
            tally.add(_values(stored[name]).reshape(-1), expected.reshape(-1))
            checks.append(ParameterCheck(name, *tally.counts))
        elif name.endswith(".weight"):
            checks.append(ParameterCheck(f"{name} (missing)", expected.numel(), expected.numel()))
    return tuple(checks)


def _tensors(reference: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": tensor
        for path, module in reference.named_modules()
        if isinstance(module, IntegerModule) or hasattr(module, "weight_scale")
        for name, tensor in module.named_buffers(recurse=False)
    }


def _values(tensor: onnx.TensorProto) -> Tensor:
    array = numpy_helper.to_array(tensor)
    # The narrow integers come as ml_dtypes, which torch does not know.
    wide = array.astype("float32") if array.dtype.kind == "V" or array.dtype.itemsize == 1 else array
    return torch.from_numpy(wide.copy())
