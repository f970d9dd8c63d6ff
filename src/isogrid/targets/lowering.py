"""From a converted model to the file of a runtime that takes `torch.export` programs, in the runtime's own process."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isogrid.files import write_whole
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
        "packed": parts.packed,
        "grids": [(grid.scale, grid.zero_point) for grid in parts.grids],
    }
    programs = {"forward": parts.program, "observe": parts.observing}
    content, versions = _lowered(runtime, programs, json.dumps(note), path.suffix, quantized=True)
    artifact = Artifact(path, runtime, {}, plan, versions, sha256="")
    return write_artifact(artifact, lambda temporary: temporary.write_bytes(content))


def lower_float(model: nn.Module, example_inputs: tuple[Any, ...], path: Path, runtime: str) -> Path:
    """Write a float model for a runtime, to hold latency and size against it.

    Its worker measures it: `load` it by its path, then `measure` the method `forward`.
    """
    with torch.no_grad():
        program = torch.export.export(model.eval(), example_inputs)
    content, _ = _lowered(runtime, {"forward": program}, "", path.suffix, quantized=False)
    write_whole(path, lambda temporary: temporary.write_bytes(content))
    return path


def _lowered(
    runtime: str, programs: Mapping[str, torch.export.ExportedProgram], note: str, suffix: str, quantized: bool
) -> tuple[bytes, dict[str, str]]:
    """What a worker makes of programs, and the versions it made it with."""
    worker = Worker(runtime)
    try:
        files = {name: str(worker.folder / f"{name}.pt2") for name in programs}
        for name, program in programs.items():
            torch.export.save(program, files[name])
        lowered = worker.folder / f"lowered{suffix}"
        answer = worker.call("lower", programs=files, note=note, path=str(lowered), quantized=quantized)
        return lowered.read_bytes(), answer.value
    finally:
        worker.close()
