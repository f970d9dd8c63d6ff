"""QONNX: networks for FPGAs with any number of bits a layer, as FINN and hls4ml read them."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from isogrid.errors import TargetError
from isogrid.formats import Format, IntegerGrid, PerChannel, PerTensor
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import Scheme
from isogrid.targets.artifact import Artifact, artifact_for
from isogrid.targets.onnx_artifact import write_onnx
from isogrid.targets.onnx_passes import drop_unused
from isogrid.targets.qonnx_model import QonnxModel
from isogrid.targets.qonnx_nodes import write_quant_nodes

STATIC_KINDS = ("linear", "convolution", "add", "concat", "average_pool")


class Qonnx:
    """The target `qonnx`: an ONNX file with Quant nodes.

    Weights and activations have 2 to 8 bits each, no zero points, and scales that are powers of two unless a rule says
    otherwise: then sums of values are sums of integers, whoever computes them. Behind a ReLU activations are unsigned.
    """

    name = "qonnx"
    kernels = "qonnx"
    float_endings = frozenset({"linear"})
    fused_layers: tuple[tuple[str, ...], ...] = ()
    attention = None
    fuses_additions = False

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """Symmetric activations, unsigned behind ReLU, and power-of-two scales."""
        if scheme.arithmetic != "static" or scheme.nonnegative is not None or scheme.activation is None:
            return scheme
        bits = scheme.activation.partition("/")[0].lstrip("uint")
        weight = scheme.weight if ":" in scheme.weight else f"{scheme.weight}:scale=e8m0"
        return replace(
            scheme,
            weight=weight,
            activation=f"int{bits}/tensor:scale=e8m0",
            nonnegative=f"uint{bits}/tensor:symmetric,scale=e8m0",
        )

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None where QONNX has the call quantised in this scheme; else why not."""
        if scheme.arithmetic != "static":
            return "QONNX stands for integers end to end; use a static scheme such as w4a8 or finn"
        return None if call.kind in STATIC_KINDS else f"{call.type} stays float in QONNX"

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """None: no dynamic scheme is run."""
        return None

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where a format cannot be written."""
        grid, granularity = fmt.grid, fmt.granularity
        integer = isinstance(grid, IntegerGrid) and not grid.midrise and fmt.is_symmetric and 2 <= grid.bits <= 8
        whole = isinstance(granularity, PerTensor) or (kind == "weight" and granularity == PerChannel(0))
        if not (integer and whole):
            example = "int3/channel:scale=e8m0" if kind == "weight" else "int5/tensor or uint5/tensor:symmetric"
            raise TargetError(
                f"{call.name!r}: this target writes Quant nodes of 2 to 8 bits without zero points, by tensor, or by "
                f"channel for weights, and {fmt} is none. Use {example}, say."
            )

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write a QONNX file with its sidecar `<path>.json`; its batch is that of the example inputs."""
        passes = (write_quant_nodes(plan), drop_unused)
        return write_onnx(integer_model, plan, path, options={}, passes=passes, dynamic_batch=False)

    def load(self, path: str | Path | Artifact, threads: int = 0) -> QonnxModel:
        """The artefact in the interpreter of the package qonnx.

        Raises:
            ArtifactError: the file or its sidecar is missing, corrupt or truncated.
            MissingExtraError: qonnx is not installed.
        """
        return QonnxModel(artifact_for(self.name, path))
