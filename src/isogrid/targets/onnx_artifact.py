"""Artefacts that are ONNX files."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from isogrid.errors import TargetError
from isogrid.files import write_whole
from isogrid.planning.plan import Plan
from isogrid.targets.artifact import Artifact, versions_of, write_artifact
from isogrid.targets.flat import flat_forward
from isogrid.targets.onnx_export import to_onnx
from isogrid.targets.onnx_graph import Pass

PACKAGES = ("isogrid", "torch", "onnx", "onnxscript", "onnxruntime")


def write_onnx(
    integer_model: nn.Module,
    plan: Plan,
    path: str | Path,
    *,
    options: dict[str, str],
    passes: Sequence[Pass],
    dynamic_batch: bool = True,
    check: Callable[[onnx.ModelProto], None] | None = None,
) -> Artifact:
    """Write an ONNX file with its sidecar `<path>.json`, for the plan's target.

    Args:
        integer_model: of `isogrid.convert`.
        plan: of the model.
        path: of the file.
        options: settings that keep the runtime to what was trained.
        passes: what the file's reader needs.
        dynamic_batch: leave the first dimension of every input open.
        check: raises where the reader would refuse the file, which then is not written.
    """
    path = Path(path)
    inputs = tuple(spec.zeros() for spec in plan.inputs)
    with flat_forward(integer_model, plan.arguments):
        names = [spec.name for spec in plan.inputs]
        proto = to_onnx(integer_model, inputs, input_names=names, passes=passes, dynamic_batch=dynamic_batch)
    if check is not None:
        check(proto)
    versions = versions_of(*PACKAGES)
    properties = {
        "isogrid.plan": json.dumps(json.loads(plan.to_json()), separators=(",", ":")),
        "isogrid.versions": json.dumps(versions),
        "isogrid.session_options": json.dumps(options),
        "isogrid.digest": hashlib.sha256(_serialized(proto)).hexdigest(),
    }
    onnx.helper.set_model_props(proto, properties)
    content = _serialized(proto)
    artifact = Artifact(path, plan.target, options, plan, versions, sha256="")
    return write_artifact(artifact, lambda temporary: temporary.write_bytes(content))


def export_float(model: nn.Module, example_inputs: tuple[Any, ...], path: str | Path) -> Path:
    """Write a float model as ONNX, to hold latency and size against it."""
    path = Path(path)
    content = _serialized(to_onnx(model.eval(), example_inputs))
    write_whole(path, lambda temporary: temporary.write_bytes(content))
    return path


def _serialized(proto: onnx.ModelProto) -> bytes:
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if size >= onnx.checker.MAXIMUM_PROTOBUF:
        raise TargetError(f"The model's tensors take {size / 1e9:.1f} GB, and one ONNX file can hold 2 GB.")
    return bytes(proto.SerializeToString())
