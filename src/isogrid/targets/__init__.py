"""One file a runtime: what it can run, how it computes, how its artefact is written and run."""

from isogrid.errors import TargetError
from isogrid.planning.rules import nearest
from isogrid.targets.artifact import Artifact, read_artifact
from isogrid.targets.onnxruntime import LoadedModel, OnnxRuntime

TARGETS = {target.name: target for target in (OnnxRuntime(),)}
"""The runtimes by name."""


def target_from_name(name: str) -> OnnxRuntime:
    """A runtime by its name; raises TargetError with the nearest names where there is none.

    >>> target_from_name("onnxruntime").name
    'onnxruntime'
    """
    if name not in TARGETS:
        raise TargetError(f"Unknown target {name!r}.{nearest(name, TARGETS)} Known: {', '.join(TARGETS)}.")
    return TARGETS[name]


__all__ = ["TARGETS", "Artifact", "LoadedModel", "OnnxRuntime", "read_artifact", "target_from_name"]
