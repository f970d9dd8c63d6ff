"""ExecuTorch with XNNPACK: a .pte file that runs in integers on the CPUs of phones and desktops."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from isogrid.formats import Format
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import Scheme
from isogrid.targets.artifact import Artifact, artifact_for
from isogrid.targets.lowering import lower
from isogrid.targets.worker_model import Vocabulary, WorkerModel
from isogrid.targets.xnnpack import (
    check_dynamic_format,
    check_static_format,
    check_steps,
    static_scheme,
    why_not_static,
)

WHAT = "ExecuTorch's XNNPACK"

DYNAMIC_WEIGHTS = {"int8/group32": "int8/channel", "int4/group32": "int4/group32:scale=bfloat16"}
"""What the weights of schemes that name no runtime become."""

WORDS = Vocabulary(
    runtime="executorch",
    multiplying=frozenset(
        {"XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected", "XNNBatchMatrixMultiply"}
        # ExecuTorch's own kernels, in float.
        | {f"aten::{name}" for name in ("convolution", "linear", "addmm", "bmm", "mm", "baddbmm")}
    ),
    arranging=frozenset({"XNNStaticTranspose", "XNNStaticReshape"}),
    codes="xnn_datatype_q",
)


class ExecuTorch:
    """The target `executorch`.

    A static scheme becomes a graph of `quantized_decomposed` operators, which ExecuTorch's partitioner hands to
    XNNPACK's integer kernels.
    """

    name = "executorch"
    kernels = "xnnpack"
    float_endings: frozenset[str] = frozenset()
    fused_layers: tuple[tuple[str, ...], ...] = ()
    attention = None
    fuses_additions = False

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme as XNNPACK stores it: activations in int8 with a zero point, scales of groups in bfloat16."""
        if scheme.arithmetic == "dynamic":
            return replace(scheme, weight=DYNAMIC_WEIGHTS.get(scheme.weight, scheme.weight))
        return static_scheme(scheme)

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None where XNNPACK runs the call quantised in this scheme; else why not."""
        if scheme.arithmetic == "static":
            return why_not_static(call, WHAT)
        if scheme.arithmetic == "weight_only":
            return f"{WHAT} quantises the input of every linear layer with such weights; use a dynamic scheme, 8da4w"
        return None if call.kind == "linear" else f"{WHAT} quantises the input of linear layers, not of {call.type}"

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """Rows of int8 with a zero point each."""
        return "qd8" if scheme.arithmetic == "dynamic" else None

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where a format cannot run."""
        if scheme.arithmetic == "dynamic":
            check_dynamic_format(fmt, call, WHAT)
        else:
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
        check_steps(integer_model, WHAT)
        return lower(integer_model, plan, Path(path), self.name, stored_as="codes")

    def load(self, path: str | Path | Artifact, threads: int = 0) -> WorkerModel:
        """A .pte file in ExecuTorch's runtime, in a process of its own.

        Args:
            path: of the file, or the artefact.
            threads: of XNNPACK; 0 leaves it to ExecuTorch.

        Raises:
            ArtifactError: the file or its sidecar is missing, corrupt or truncated.
            TargetError: ExecuTorch cannot load it.
            MissingExtraError: ExecuTorch is not installed.
        """
        return WorkerModel(artifact_for(self.name, path), WORDS, threads)
