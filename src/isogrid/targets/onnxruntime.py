"""ONNX Runtime on CPU: integers end to end, or weights of 2, 4 and 8 bits under float arithmetic."""

from pathlib import Path

import torch
from torch import nn

from isogrid.errors import TargetError
from isogrid.formats import (
    ExponentGrid,
    Format,
    IntegerGrid,
    NativeGrid,
    PerChannel,
    PerGroup,
    PerTensor,
    named_format,
)
from isogrid.layers.dynamic import MatMulNBits
from isogrid.layers.nbits import BITS, BLOCKS, quantizes_input
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import Scheme
from isogrid.targets.artifact import Artifact, artifact_for
from isogrid.targets.onnx_artifact import write_onnx
from isogrid.targets.onnx_graph import ONNX_RUNTIME_PASSES
from isogrid.targets.onnx_runtime_session import STATIC_OPTIONS, WEIGHT_ONLY_OPTIONS
from isogrid.targets.onnxruntime_model import OnnxRuntimeModel

STATIC_KINDS = (
    "linear", "convolution", "add", "multiply", "matmul", "concat", "where", "average_pool", "activation"
)  # fmt: skip
SESSION_OPTIONS = {**STATIC_OPTIONS, **WEIGHT_ONLY_OPTIONS}
"""Without these ONNX Runtime may compute something else than was trained."""

HARMLESS_CODE = 127
"""Two products of 255 and 127 add up to more than 16 bits hold; two of 127 and -128 do not."""


class OnnxRuntime:
    """The target `onnxruntime`.

    Static schemes become Q/DQ graphs whose matrix products and convolutions run in integer kernels; weight-only and
    dynamic schemes become `com.microsoft::MatMulNBits`.
    """

    name = "onnxruntime"
    kernels = "onnxruntime"
    float_endings = frozenset({"linear", "matmul"})
    fused_layers: tuple[tuple[str, ...], ...] = ()
    attention = None
    fuses_additions = False

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme itself: its formats are the ones that ONNX Runtime has integer kernels for."""
        return scheme

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

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """int8 by blocks as long as the weight's groups."""
        granularity = weight.granularity
        return MatMulNBits(granularity.size).name if isinstance(granularity, PerGroup) else None

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where a format cannot run."""
        if kind == "activation":
            self._check_activation(fmt, call)
        elif scheme.arithmetic == "static" and call.kind != "embedding":
            self._check_static_weight(fmt, call)
        else:
            self._check_grouped_weight(fmt, call, scheme)

    @staticmethod
    def _check_activation(fmt: Format, call: Call) -> None:
        grid = fmt.grid
        unsigned = isinstance(grid, IntegerGrid) and grid == IntegerGrid(grid.low, grid.high) and grid.low == 0
        fits = unsigned and grid.bits <= 8 and isinstance(fmt.granularity, PerTensor) and _plain_scale(fmt)
        if not fits or fmt.zero_point is None:
            raise TargetError(
                f"{call.name!r}: ONNX Runtime's integer kernels take activations as uint8/tensor, or as fewer bits in "
                f"such bytes (uint7/tensor), not {fmt}."
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
    def _check_grouped_weight(fmt: Format, call: Call, scheme: Scheme) -> None:
        grid = fmt.grid
        symmetric = isinstance(grid, IntegerGrid) and not grid.midrise and fmt.is_symmetric and _plain_scale(fmt)
        grouped = isinstance(fmt.granularity, PerGroup) and fmt.granularity.axis == -1
        if call.kind == "embedding":
            if symmetric and (grouped or isinstance(fmt.granularity, PerChannel | PerTensor)):
                return
            raise TargetError(
                f"{call.name!r}: an embedding takes symmetric integers by group of its last dimension, by channel or "
                f"tensor, not {fmt}."
            )
        size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) and grouped else 0
        if not (symmetric and grid.bits in BITS and size in BLOCKS):
            raise TargetError(
                f"{call.name!r}: MatMulNBits takes symmetric integer weights of {', '.join(map(str, BITS))} bits in "
                f"groups of {', '.join(map(str, BLOCKS))} with a float32 scale, not {fmt}. Use int4/group32, say."
            )
        if scheme.arithmetic == "dynamic" and not quantizes_input(int(grid.bits), size, accuracy_level=4):
            raise TargetError(
                f"{call.name!r}: MatMulNBits has no kernel that quantises activations for {fmt}; it would compute in "
                f"float instead. Use {_grid_name(fmt)}/group32, say, or a weight-only scheme."
            )

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write an ONNX file with its sidecar.

        Args:
            integer_model: of `isogrid.convert`.
            plan: of the model.
            path: of the file; its sidecar is `<path>.json`.
        """
        return write_onnx(integer_model, plan, path, options=session_options(plan), passes=ONNX_RUNTIME_PASSES)

    def load(self, path: str | Path | Artifact, threads: int = 0) -> OnnxRuntimeModel:
        """A session that computes what was trained: the sidecar's options are applied.

        Args:
            path: of the file, or the artefact.
            threads: within an operator; 0 leaves it to ONNX Runtime.

        Raises:
            ArtifactError: the file or its sidecar is missing, corrupt or truncated.
            TargetError: ONNX Runtime cannot load it.
        """
        return OnnxRuntimeModel(artifact_for(self.name, path), threads)


def session_options(plan: Plan) -> dict[str, str]:
    """What an artefact's sessions need: activations of 7 bits overflow on no processor, and run faster for it."""
    grids = [named_format(site.format).grid for site in plan.sites if site.kind != "weight"]
    if grids and all(grid.highest <= HARMLESS_CODE for grid in grids):
        return WEIGHT_ONLY_OPTIONS
    return SESSION_OPTIONS


def _plain_scale(fmt: Format) -> bool:
    return fmt.scale is not None and fmt.scale.grid in (NativeGrid(torch.float32), ExponentGrid())


def _grid_name(fmt: Format) -> str:
    return str(fmt).partition("/")[0]
