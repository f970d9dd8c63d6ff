"""ExecuTorch with XNNPACK: a .pte file that runs in integers on the CPUs of phones and desktops."""

import json
from pathlib import Path

import torch
from torch import nn

from isogrid.errors import ArtifactError
from isogrid.formats import Format
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import Scheme
from isogrid.targets.artifact import Artifact, read_artifact, write_artifact
from isogrid.targets.decomposed import Decomposed, decompose
from isogrid.targets.executorch_model import ExecuTorchModel
from isogrid.targets.flat import flat_forward
from isogrid.targets.subprocesses import Worker
from isogrid.targets.xnnpack import check_static_format, check_sums, static_scheme, why_not_static

WHAT = "ExecuTorch's XNNPACK"


class ExecuTorch:
    """The target `executorch`.

    A static scheme becomes a graph of `quantized_decomposed` operators, which ExecuTorch's partitioner hands to
    XNNPACK's integer kernels.
    """

    name = "executorch"
    kernels = "xnnpack"
    float_endings: frozenset[str] = frozenset()
    fuses_additions = False

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme with activations as XNNPACK stores them: int8 with a zero point."""
        return static_scheme(scheme)

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None where XNNPACK runs the call quantised in this scheme; else why not."""
        if scheme.arithmetic == "static":
            return why_not_static(call, WHAT)
        return f"{WHAT} has no {scheme.arithmetic} kernels that are known here"

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where a format cannot run."""
        check_static_format(kind, fmt, call, WHAT)

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write a .pte file with its sidecar.

        The file has two methods: `forward` is the model; `observe` is the same with the codes of every quantised tensor
        as further outputs, so that the file can be verified. They share their weights. The first dimension of the
        inputs is that of the plan's example inputs.

        Args:
            integer_model: of `isogrid.convert`.
            plan: of the model.
            path: of the file; its sidecar is `<path>.json`.

        Raises:
            TargetError: the model cannot be traced, or ExecuTorch cannot lower it.
            MissingExtraError: ExecuTorch is not installed.
        """
        check_sums(integer_model, WHAT)
        worker = Worker(self.name)
        try:
            with flat_forward(integer_model, plan.arguments):
                parts = decompose(integer_model, tuple(spec.zeros() for spec in plan.inputs))
            programs = save_programs(parts, worker.folder)
            note = {"inputs": [spec.name for spec in plan.inputs], "codes": parts.codes, "layers": parts.layers}
            lowered = worker.folder / "lowered.pte"
            versions = worker.call("lower", programs=programs, note=json.dumps(note), path=str(lowered)).value
            artifact = Artifact(Path(path), self.name, {}, plan, versions, sha256="")
            content = lowered.read_bytes()
            return write_artifact(artifact, lambda temporary: temporary.write_bytes(content))
        finally:
            worker.close()

    def load(self, path: str | Path | Artifact, threads: int = 0) -> ExecuTorchModel:
        """A .pte file in ExecuTorch's runtime, in a process of its own.

        Args:
            path: of the file, or the artefact.
            threads: of XNNPACK; 0 leaves it to ExecuTorch.

        Raises:
            ArtifactError: the file or its sidecar is missing, corrupt or truncated.
            TargetError: ExecuTorch cannot load it.
            MissingExtraError: ExecuTorch is not installed.
        """
        artifact = path if isinstance(path, Artifact) else read_artifact(path)
        if artifact.target != self.name:
            raise ArtifactError(
                f"{artifact.path} is for {artifact.target}, not for {self.name}. Load it with isogrid.load(path)."
            )
        return ExecuTorchModel(artifact, threads)


def save_programs(parts: Decomposed, folder: Path) -> dict[str, str]:
    """Write both programs of a decomposed model; their files by the names of the methods they become."""
    files = {name: str(folder / f"{name}.pt2") for name in ("forward", "observe")}
    torch.export.save(parts.program, files["forward"])
    torch.export.save(parts.observing, files["observe"])
    return files
