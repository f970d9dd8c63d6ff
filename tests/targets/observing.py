"""What a file computes on the way, without a plan that it belongs to."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from isogrid.planning import Plan
from isogrid.targets import Artifact, Observed
from isogrid.targets.onnxruntime_model import OnnxRuntimeModel


def observed(path: Path, options: Mapping[str, str], *inputs: Tensor) -> Observed:
    plan = Plan("onnxruntime", "onnxruntime", "w8a8", sites=(), layers=(), operations=(), scopes={}, floats=())
    return OnnxRuntimeModel(Artifact(path, "onnxruntime", dict(options), plan, {}, sha256="")).observe(*inputs)
