"""The exporter's translations of PyTorch's operators, made once a process.

`torch.onnx.export` reads the sources of its 500 translations again at every call, which takes half of the time that a
small model's export takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

from torch.onnx._internal.exporter._registration import ONNXRegistry


@contextmanager
def registry_made_once() -> Iterator[None]:
    """While open, `torch.onnx.export` begins with a copy of the registry that its first call made.

    >>> with registry_made_once():
    ...     first, second = ONNXRegistry.from_torchlib(21), ONNXRegistry.from_torchlib(21)
    >>> first.functions == second.functions, first.functions is second.functions
    (True, False)
    """
    with patch.object(ONNXRegistry, "from_torchlib", staticmethod(_copy)):
        yield


def _copy(opset_version: int) -> ONNXRegistry:
    made = _registry(opset_version)
    copy = ONNXRegistry()
    copy._opset_version = opset_version
    copy.functions = {target: list(translations) for target, translations in made.functions.items()}
    return copy


_from_torchlib = ONNXRegistry.from_torchlib


@cache
def _registry(opset_version: int) -> ONNXRegistry:
    return _from_torchlib(opset_version)
