"""ONNX Runtime on CPU: integers end to end, or weights of 2, 4 and 8 bits under float arithmetic."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from isogrid.errors import ArtifactError, TargetError
from isogrid.files import digest, write_whole
from isogrid.formats import Format, IntegerGrid, NativeGrid, PerChannel, PerGroup, PerTensor
from isogrid.layers.nbits import BITS, BLOCKS
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import Scheme
from isogrid.targets.artifact import Artifact, read_artifact
from isogrid.targets.onnx_export import to_onnx
from isogrid.targets.onnx_runtime_session import (
    STATIC_OPTIONS,
    WEIGHT_ONLY_OPTIONS,
    float_layers,
    intermediate_codes,
    open_session,
)

STATIC_KINDS = ("linear", "convolution", "add", "concat", "average_pool")
SESSION_OPTIONS = {**STATIC_OPTIONS, **WEIGHT_ONLY_OPTIONS}
"""Without these ONNX Runtime may compute something else than was trained."""

PACKAGES = ("isogrid", "torch", "onnx", "onnxscript", "onnxruntime")


class OnnxRuntime:
    """The target `onnxruntime`.

    Static schemes become Q/DQ graphs whose matrix products and convolutions run in integer kernels; weight-only and
    dynamic schemes become `com.microsoft::MatMulNBits`.
    """

    name = "onnxruntime"

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None where ONNX Runtime runs the call quantised in this scheme; else why not."""
        if call.kind == "embedding":
            return None
        if scheme.arithmetic == "static":
            if call.kind in STATIC_KINDS:
                return None
            return f"{call.type} has no integer kernel"
        if call.kind == "linear":
            return None
        return f"MatMulNBits computes linear layers only, and this is {call.type}"

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where a format cannot run."""
        if kind == "activation":
            self._check_activation(fmt, call)
        elif scheme.arithmetic == "static" and call.kind != "embedding":
            self._check_static_weight(fmt, call)
        else:
            self._check_grouped_weight(fmt, call)

    @staticmethod
    def _check_activation(fmt: Format, call: Call) -> None:
        fits = fmt.grid == IntegerGrid(0, 255) and isinstance(fmt.granularity, PerTensor) and _plain_scale(fmt)
        if not fits or fmt.zero_point is None:
            raise TargetError(
                f"{call.name!r}: ONNX Runtime's integer kernels take activations as uint8/tensor, not {fmt}."
            )

    @staticmethod
    def _check_static_weight(fmt: Format, call: Call) -> None:
        grid = fmt.grid
        integer = isinstance(grid, IntegerGrid) and not grid.midrise and grid.low >= -128 and grid.high <= 127
        whole = isinstance(fmt.granularity, PerTensor) or fmt.granularity == PerChannel(0)
        if not (integer and whole and fmt.is_symmetric and _plain_scale(fmt)):
            raise TargetError(
                f"{call.name!r}: ONNX Runtime's integer kernels take symmetric integer weights of up to 8 bits with a "
                f"float32 scale per channel or tensor, not {fmt}. Use int8/channel, int4/channel or ternary/channel."
            )

    @staticmethod
    def _check_grouped_weight(fmt: Format, call: Call) -> None:
        grid = fmt.grid
        symmetric = isinstance(grid, IntegerGrid) and not grid.midrise and fmt.is_symmetric and _plain_scale(fmt)
        if call.kind == "embedding":
            if symmetric and isinstance(fmt.granularity, PerGroup | PerChannel | PerTensor):
                return
            raise TargetError(
                f"{call.name!r}: an embedding takes symmetric integers by group, channel or tensor, not {fmt}."
            )
        size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else 0
        if not (symmetric and grid.bits in BITS and size in BLOCKS):
            raise TargetError(
                f"{call.name!r}: MatMulNBits takes symmetric integer weights of {', '.join(map(str, BITS))} bits in "
                f"groups of {', '.join(map(str, BLOCKS))} with a float32 scale, not {fmt}. Use int4/group32, say."
            )

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write an ONNX file with its sidecar.

        Args:
            integer_model: of `isogrid.convert`.
            plan: of the model.
            path: of the file; its sidecar is `<path>.json`.
        """
        path = Path(path)
        names = _input_names(integer_model)
        inputs = tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in plan.inputs)
        proto = to_onnx(integer_model, inputs, input_names=names[: len(inputs)] or None)
        versions = _versions()
        content = hashlib.sha256(proto.SerializeToString()).hexdigest()
        compact = json.dumps(json.loads(plan.to_json()), separators=(",", ":"))
        onnx.helper.set_model_props(
            proto, {"isogrid.plan": compact, "isogrid.versions": json.dumps(versions), "isogrid.digest": content}
        )
        write_whole(path, lambda temporary: temporary.write_bytes(proto.SerializeToString()))
        artifact = Artifact(path, self.name, SESSION_OPTIONS, plan, versions, digest(path))
        artifact.write_sidecar()
        return artifact

    def load(self, path: str | Path | Artifact, threads: int = 0) -> "LoadedModel":
        """A session that computes what was trained: the sidecar's options are applied.

        Raises:
            ArtifactError: the file or its sidecar is missing, corrupt or truncated.
        """
        return LoadedModel(path if isinstance(path, Artifact) else read_artifact(path), threads)


class Observed(NamedTuple):
    """What a runtime computed on the way.

    Attributes:
        outputs: of the model.
        codes: of every quantised tensor, by name.
        layers: input and output of every MatMulNBits, by the layer's path.
    """

    outputs: list[Tensor]
    codes: dict[str, Tensor]
    layers: dict[str, tuple[Tensor, Tensor]]


class LoadedModel:
    """An artefact in an ONNX Runtime session; call it with tensors.

    Args:
        artifact: read and checked.
        threads: within an operator; 0 leaves it to ONNX Runtime.
    """

    def __init__(self, artifact: Artifact, threads: int = 0):
        if artifact.target != OnnxRuntime.name:
            raise ArtifactError(f"{artifact.path} is for {artifact.target}, not for {OnnxRuntime.name}.")
        self.artifact = artifact
        self.session = open_session(artifact.path, artifact.session_options, threads)
        self.input_names = [entry.name for entry in self.session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The model's outputs, as tensors on the CPU."""
        return [torch.from_numpy(output) for output in self.session.run(None, self.feeds(inputs))]

    def observe(self, *inputs: Tensor) -> "Observed":
        """Run once more with every quantised tensor, and every float layer of few bits, as an output."""
        path, options = self.artifact.path, self.artifact.session_options
        feeds = self.feeds(inputs)
        codes = {name: torch.from_numpy(values) for name, values in intermediate_codes(path, options, feeds).items()}
        layers = {
            name: (torch.from_numpy(x), torch.from_numpy(y))
            for name, (x, y) in float_layers(path, options, feeds).items()
        }
        return Observed(self(*inputs), codes, layers)

    def feeds(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """Inputs by the names that the file has for them."""
        if len(inputs) != len(self.input_names):
            raise TargetError(f"The artefact takes {len(self.input_names)} inputs, not {len(inputs)}.")
        return {name: x.detach().cpu().numpy() for name, x in zip(self.input_names, inputs, strict=True)}


def export_float(model: nn.Module, example_inputs: tuple[Any, ...], path: str | Path) -> Path:
    """Write a float model as ONNX, to hold latency and size against it."""
    path = Path(path)
    proto = to_onnx(model.eval(), example_inputs)
    write_whole(path, lambda temporary: temporary.write_bytes(proto.SerializeToString()))
    return path


def _plain_scale(fmt: Format) -> bool:
    return fmt.scale is not None and fmt.scale.grid == NativeGrid(torch.float32)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return {**found, "onnxruntime": onnxruntime.__version__}


def _input_names(model: nn.Module) -> list[str]:
    """The names of the arguments of a model's own forward, also where a scope wraps it."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
