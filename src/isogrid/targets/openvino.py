"""OpenVINO on CPU: integers end to end by power-of-two scales, or weights of 4 and 8 bits under float arithmetic."""

from dataclasses import replace
from pathlib import Path

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
    pick_before_pointwise,
    round_before_additions,
    round_model_inputs,
)
from isogrid.targets.openvino_model import OpenVinoModel

STATIC_KINDS = ("linear", "convolution", "add", "concat", "average_pool")
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Without these OpenVINO computes in bfloat16 where it can, and quantises activations that nobody trained for."""

ACTIVATION = "uint8/tensor:even,scale=e8m0"
BITS, BLOCKS = (4, 8), (16, 32, 64, 128, 256)


class OpenVino:
    """The target `openvino`: an ONNX file with Q/DQ that OpenVINO reads and runs in int8 kernels.

    OpenVINO multiplies by reciprocals of scales and adds zero points before it rounds. With scales that are powers of
    two and even zero points that makes no difference, so these are what its schemes train with; weights have 7 bits,
    because its kernels for processors without VNNI add pairs of products in 16 bits.
    """

    name = "openvino"
    kernels = "openvino"
    float_endings = frozenset({"linear"})
    fused_layers: tuple[tuple[str, ...], ...] = ()
    attention = None
    fuses_additions = True

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """Static schemes with power-of-two scales, even zero points and weights of at most 7 bits."""
        if scheme.arithmetic != "static":
            return scheme
        grid, _, rest = scheme.weight.partition("/")
        options = rest if ":" in rest else f"{rest}:scale=e8m0"
        weight = f"{'int7' if grid == 'int8' else grid}/{options}"
        activation = ACTIVATION if scheme.activation == "uint8/tensor" else scheme.activation
        return replace(scheme, weight=weight, activation=activation)

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None where OpenVINO runs the call quantised in this scheme; else why not."""
        if scheme.arithmetic == "dynamic":
            return "OpenVINO quantises activations by a rule that is not reproduced here; use a weight-only scheme"
        if scheme.arithmetic == "static":
            if call.kind == "add" and not call.is_plain_sum:
                return "differences and sums with numbers stay float in OpenVINO"
            return None if call.kind in STATIC_KINDS else f"{call.type} has no integer kernel"
        return None if call.kind == "linear" else f"packed weights are those of linear layers, and this is {call.type}"

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """None: no dynamic scheme is run."""
        return None

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where a format cannot run."""
        if kind == "activation":
            if fmt.grid != IntegerGrid(0, 255) or not isinstance(fmt.granularity, PerTensor):
                raise TargetError(
                    f"{call.name!r}: OpenVINO's integer kernels are exact for activations as {ACTIVATION}, not {fmt}."
                )
            return
        grid, granularity = fmt.grid, fmt.granularity
        integer = isinstance(grid, IntegerGrid) and not grid.midrise and fmt.is_symmetric and grid.bits <= 8
        if scheme.arithmetic == "static":
            if not integer or not (isinstance(granularity, PerTensor) or granularity == PerChannel(0)):
                raise TargetError(
                    f"{call.name!r}: OpenVINO's integer kernels take symmetric integer weights with a scale per "
                    f"channel or tensor, not {fmt}. Use int7/channel:scale=e8m0, say."
                )
        else:
            whole = isinstance(granularity, PerGroup) and granularity.axis == -1 and not granularity.pads
            size = granularity.size if isinstance(granularity, PerGroup) and whole else 0
            plain = fmt.scale is not None and fmt.scale.grid == NativeGrid(torch.float32)
            if not (integer and grid.bits in BITS and size in BLOCKS and plain):
                raise TargetError(
                    f"{call.name!r}: OpenVINO takes symmetric integer weights of {' or '.join(map(str, BITS))} bits in "
                    f"groups of {', '.join(map(str, BLOCKS))} with a float32 scale, not {fmt}. Use int4/group32, say."
                )

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write an ONNX file with its sidecar `<path>.json`; OpenVINO is not needed for it."""
        passes = (
            dequantize_packed_weights,
            clamp_before_rounding,
            round_model_inputs,
            round_before_additions,
            pick_before_pointwise,
            drop_unused,
        )
        return write_onnx(integer_model, plan, path, options=OPTIONS, passes=passes)

    def load(self, path: str | Path | Artifact, threads: int = 0) -> OpenVinoModel:
        """The artefact in OpenVINO, with the sidecar's options.

        Raises:
            ArtifactError: the file or its sidecar is missing, corrupt or truncated.
            MissingExtraError: OpenVINO is not installed.
            TargetError: OpenVINO cannot load it.
        """
        return OpenVinoModel(artifact_for(self.name, path), threads)
