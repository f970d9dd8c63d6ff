"""One file a runtime: what it can run, how it computes, how its artefact is written and run."""

from importlib import import_module
from pathlib import Path
from typing import NamedTuple, cast

from isogrid.errors import ArtifactError, MissingExtraError, TargetError
from isogrid.planning.rules import nearest
from isogrid.targets.artifact import Artifact, read_artifact
from isogrid.targets.runtime import LoadedModel, Observed, Runtime, RuntimeOperator


class Entry(NamedTuple):
    """Where a target is found.

    Attributes:
        module, type: of its class.
        requirement: what to install for it, `isogrid[extra]` where it is optional.
    """

    module: str
    type: str
    requirement: str


TARGETS = {
    "onnxruntime": Entry("isogrid.targets.onnxruntime", "OnnxRuntime", "isogrid"),
    "executorch": Entry("isogrid.targets.executorch", "ExecuTorch", "isogrid[executorch]"),
    "qonnx": Entry("isogrid.targets.qonnx", "Qonnx", "isogrid[qonnx]"),
    "tensorrt": Entry("isogrid.targets.tensorrt", "TensorRt", "isogrid"),
    "openvino": Entry("isogrid.targets.openvino", "OpenVino", "isogrid[openvino]"),
    "torch-export": Entry("isogrid.targets.torch_export", "TorchExport", "isogrid"),
    "pytorch": Entry("isogrid.targets.pytorch", "PyTorch", "isogrid"),
    "litert": Entry("isogrid.targets.litert", "LiteRT", "isogrid[litert]"),
    "vllm": Entry("isogrid.targets.vllm", "Vllm", "isogrid[vllm]"),
    "bitsandbytes": Entry("isogrid.targets.bitsandbytes", "Bitsandbytes", "isogrid[bitsandbytes]"),
    "llamacpp": Entry("isogrid.targets.llamacpp", "LlamaCpp", "isogrid[gguf]"),
}
"""The runtimes by name. A runtime's packages are imported when it is asked for, not before."""


def target_from_name(name: str) -> Runtime:
    """A runtime by its name.

    Raises:
        TargetError: there is no such target; the message shows the nearest names.
        MissingExtraError: a package that it needs is not installed; the message says what to install.

    >>> target_from_name("onnxruntime").name
    'onnxruntime'
    """
    if name not in TARGETS:
        raise TargetError(f"Unknown target {name!r}.{nearest(name, TARGETS)} Known: {', '.join(TARGETS)}.")
    entry = TARGETS[name]
    try:
        module = import_module(entry.module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"The target {name} needs the package {error.name}, which is not installed. "
            f"Install it with: pip install '{entry.requirement}'"
        ) from error
    return cast(Runtime, getattr(module, entry.type)())


def load_artifact(artifact: Artifact | str | Path) -> LoadedModel:
    """An artefact in the runtime that it was exported for; from its path, the file is checked against its sidecar.

    Raises:
        ArtifactError: the file or its sidecar is missing, corrupt or truncated, or is for an unknown target.
        MissingExtraError: the runtime is not installed.
    """
    artifact = artifact if isinstance(artifact, Artifact) else read_artifact(artifact)
    if artifact.target not in TARGETS:
        raise ArtifactError(
            f"{artifact.path} is for the target {artifact.target!r}, which this Isogrid does not have. "
            f"Known: {', '.join(TARGETS)}. Upgrade Isogrid, or export for one of these."
        )
    return target_from_name(artifact.target).load(artifact)


__all__ = [
    "TARGETS",
    "Artifact",
    "LoadedModel",
    "Observed",
    "Runtime",
    "RuntimeOperator",
    "load_artifact",
    "read_artifact",
    "target_from_name",
]
