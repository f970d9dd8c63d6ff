"""TensorRT: Q/DQ files by its rules. It is not run itself; the same file runs in ONNX Runtime, as it is written."""

from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import nn

from isogrid.errors import TargetError
from isogrid.formats import Format, IntegerGrid, NativeGrid, PerChannel, PerGroup, PerTensor
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import Scheme
from isogrid.targets.artifact import Artifact, artifact_for
from isogrid.targets.onnx_artifact import write_onnx
from isogrid.targets.onnx_passes import (
    clamp_before_rounding,
    dequantize_packed_weights,
    drop_unused,
    store_float_biases,
)
from isogrid.targets.onnx_runtime_session import OPTIMIZATIONS
from isogrid.targets.onnx_stored import write_stored_layers
from isogrid.targets.tensorrt_model import TensorRtModel
from isogrid.targets.tensorrt_placement import LEAST_GEMM
from isogrid.targets.tensorrt_rules import INT4_BLOCKS, lint

STATIC_KINDS = ("linear", "convolution", "add", "concat")
FP8, NVFP4 = "fp8_e4m3/tensor", "nvfp4"
FLOAT_WEIGHTS = (FP8, NVFP4)
HALVES = frozenset({"Linear", "Conv1d", "Conv2d", "Conv3d"})
"""What computes in float16 where it stays float: in a strongly typed network the types of the file are what runs."""

OPTIONS = {OPTIMIZATIONS: "none"}

REMEDIES = {
    "between": "A layer that is called more than once absorbs an activation only if each of its calls has it: call one "
    'layer a use, or keep it float by ig.Rule(match=<the layer>, keep="float").'
}
"""What a model's author can do about a rule, where that is not what the author of a file would do."""


class TensorRt:
    """The target `tensorrt`: a strongly typed ONNX file with explicit Q/DQ.

    Inputs of convolutions and products are quantised, symmetric and without a zero point; a layer before an addition
    ends in float, and the residual that is added is quantised; heads and small products compute in float16.
    """

    name = "tensorrt"
    kernels = "tensorrt"
    float_endings = frozenset({"linear", "convolution"})
    fused_layers: tuple[tuple[str, ...], ...] = ()
    attention = None
    fuses_additions = True

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """Symmetric int8 activations; weights alone in INT4 blocks of 128; what stays float in float16."""
        scheme = replace(scheme, halves=HALVES)
        if scheme.arithmetic == "static":
            return replace(scheme, activation="int8/tensor", least_product=LEAST_GEMM, keeps_heads=True)
        if scheme.weight in FLOAT_WEIGHTS:
            return replace(scheme, keeps_heads=True)
        return replace(scheme, weight="int4/group128") if scheme.weight == "int4/group32" else scheme

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None where TensorRT runs the call quantised in this scheme; else why not."""
        if scheme.arithmetic == "dynamic":
            return "TensorRT quantises INT8 and INT4 with stored scales only"
        if scheme.arithmetic == "float" and scheme.activation is None:
            return "FP8 inputs have one stored scale in TensorRT; use the scheme fp8"
        if scheme.arithmetic == "static":
            return None if call.kind in STATIC_KINDS else f"{call.type} stays float, between quantised layers"
        return None if call.kind == "linear" else f"weights alone are those of linear layers, and this is {call.type}"

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """None: no dynamic scheme is run."""
        return None

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where a format cannot run."""
        grid, granularity = fmt.grid, fmt.granularity
        plain = fmt.scale is not None and fmt.scale.grid == NativeGrid(torch.float32)
        integer = isinstance(grid, IntegerGrid) and not grid.midrise and fmt.is_symmetric
        if scheme.arithmetic == "float":
            if str(fmt) != FP8:
                raise TargetError(f"{call.name!r}: TensorRT multiplies FP8 weights and inputs as {FP8}, not {fmt}.")
            return
        if kind == "activation":
            if not (grid == IntegerGrid(-128, 127) and isinstance(granularity, PerTensor) and integer):
                raise TargetError(
                    f"{call.name!r}: TensorRT takes activations as int8/tensor, without a zero point, not {fmt}."
                )
        elif scheme.arithmetic == "static":
            whole = isinstance(granularity, PerTensor) or granularity == PerChannel(0)
            if not (integer and grid.bits <= 8 and whole):
                raise TargetError(
                    f"{call.name!r}: TensorRT multiplies int8 activations by symmetric integers of up to 8 bits with a "
                    f"scale per channel or tensor, not by {fmt}. Use int8/channel."
                )
        else:
            size = granularity.size if isinstance(granularity, PerGroup) and not granularity.pads else 0
            if str(fmt) != NVFP4 and not (integer and grid.bits == 4 and size in INT4_BLOCKS and plain):
                raise TargetError(
                    f"{call.name!r}: TensorRT takes weights alone as INT4 in blocks of "
                    f"{' or '.join(map(str, INT4_BLOCKS))}, or as {NVFP4}, not {fmt}. Use int4/group128."
                )

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write an ONNX file with its sidecar `<path>.json`, and hold it against TensorRT's rules.

        Raises:
            TargetError: the file breaks a rule; the message says which.
        """
        weights = (write_stored_layers, dequantize_packed_weights)
        passes = (*weights, clamp_before_rounding, store_float_biases, drop_unused)
        return write_onnx(integer_model, plan, path, options=OPTIONS, passes=passes, check=_check_rules)

    def load(self, path: str | Path | Artifact, threads: int = 0) -> TensorRtModel:
        """The artefact in ONNX Runtime, without its optimisations: what the file says, in float32.

        Raises:
            ArtifactError: the file or its sidecar is missing, corrupt or truncated.
            TargetError: ONNX Runtime cannot load it.
        """
        return TensorRtModel(artifact_for(self.name, path), threads)


def _check_rules(model: onnx.ModelProto) -> None:
    broken = [finding for finding in lint(model) if finding.severity == "error"]
    if broken:
        remedy = REMEDIES.get(broken[0].rule, broken[0].remedy)
        raise TargetError(
            f"The file would break a rule of TensorRT: {broken[0].node}: {broken[0].problem}. {remedy}"
        )
