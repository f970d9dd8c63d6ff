"""From a converted model to the file of a runtime that takes `torch.export` programs, in the runtime's own process."""

import json
from pathlib import Path

import torch
from torch import nn

from isogrid.planning.plan import Plan
from isogrid.targets.artifact import Artifact, write_artifact
from isogrid.targets.decomposed import decompose
from isogrid.targets.flat import flat_forward
from isogrid.targets.subprocesses import Worker


def lower(integer_model: nn.Module, plan: Plan, path: Path, runtime: str, stored_as: str) -> Artifact:
    """Write an artefact with two methods: `forward` is the model, `observe` also puts out all codes.

    Args:
        integer_model: of `isogrid.convert`.
        plan: of the model.
        path: of the file.
        runtime: name of the target and of its worker, whose function `lower` writes the file.
        stored_as: as for `decompose`.
    """
    with flat_forward(integer_model, plan.arguments):
        parts = decompose(integer_model, tuple(spec.zeros() for spec in plan.inputs), stored_as=stored_as)
    note = {
        "inputs": [spec.name for spec in plan.inputs],
        "codes": parts.codes,
        "layers": parts.layers,
        "grids": [(grid.scale, grid.zero_point) for grid in parts.grids],
    }
    worker = Worker(runtime)
    try:
        programs = {name: str(worker.folder / f"{name}.pt2") for name in ("forward", "observe")}
        torch.export.save(parts.program, programs["forward"])
        torch.export.save(parts.observing, programs["observe"])
        lowered = worker.folder / f"lowered{path.suffix}"
        versions = worker.call("lower", programs=programs, note=json.dumps(note), path=str(lowered)).value
        content = lowered.read_bytes()
    finally:
        worker.close()
    artifact = Artifact(path, runtime, {}, plan, versions, sha256="")
    return write_artifact(artifact, lambda temporary: temporary.write_bytes(content))
