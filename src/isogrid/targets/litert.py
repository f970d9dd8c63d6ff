"""LiteRT, once TensorFlow Lite: a .tflite file that runs in integers through XNNPACK, with int8 inputs and outputs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from isogrid.formats import Format
from isogrid.layers import arithmetic, xnnpack_kernels
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import Scheme
from isogrid.targets.artifact import Artifact, artifact_for
from isogrid.targets.lowering import lower
from isogrid.targets.worker_model import Vocabulary, WorkerModel
from isogrid.targets.xnnpack import check_static_format, check_steps, static_scheme, why_not_static

WHAT = "LiteRT's XNNPACK"

ACTIVATIONS = frozenset({"gelu", "leaky_relu"})
"""Functions with an integer kernel for any grids; sigmoid and tanh have one for a single output grid."""

WORDS = Vocabulary(
    runtime="litert",
    multiplying=frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL"}),
    arranging=frozenset({"TRANSPOSE", "RESHAPE", "DEQUANTIZE"}),
    codes="torch.int8",
)


class LiteRT:
    """The target `litert`.

    A static scheme becomes a .tflite file whose inputs and outputs are codes where the model's first and last layers
    are quantised; `load(path)` takes and returns float values.
    """

    name = "litert"
    kernels = "litert"
    float_endings: frozenset[str] = frozenset()
    fused_layers: tuple[tuple[str, ...], ...] = ()
    attention = None
    fuses_additions = False

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme with activations as LiteRT stores them: int8 with a zero point, kept by averages over windows."""
        return replace(static_scheme(scheme), pools_keep_grid=True)

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None where LiteRT runs the call quantised in this scheme; else why not."""
        if scheme.arithmetic == "static" and call.kind == "activation" and call.type.rstrip("_") in ACTIVATIONS:
            return None
        if scheme.arithmetic == "static" and call.pooling is not None and call.pools_windows:
            pads = any(call.pooling.padding) or call.pooling.ceil_mode
            return f"{WHAT} averages codes over windows inside two dimensions" if pads or len(call.shape) != 4 else None
        if scheme.arithmetic == "static":
            return why_not_static(call, WHAT)
        return f"Isogrid writes static integers only for LiteRT, not {scheme.arithmetic} schemes"

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """None: no dynamic scheme is run."""
        return None

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where a format cannot run."""
        check_static_format(kind, fmt, call, WHAT)

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write a .tflite file with its sidecar.

        The file has two signatures: `forward` is the model; `observe` is the same with the codes of every quantised
        tensor as further outputs, so that the file can be verified. The first dimension of the inputs is that of the
        plan's example inputs.

        Args:
            integer_model: of `isogrid.convert`.
            plan: of the model.
            path: of the file; its sidecar is `<path>.json`.

        Raises:
            TargetError: the model cannot be traced, or the converter cannot write it.
            MissingExtraError: LiteRT is not installed.
        """
        check_steps(integer_model, WHAT)
        return lower(integer_model, plan, Path(path), self.name, stored_as="values")

    def load(self, path: str | Path | Artifact, threads: int = 0) -> "LiteRTModel":
        """A .tflite file in LiteRT's interpreter, in a process of its own.

        Args:
            path: of the file, or the artefact.
            threads: of XNNPACK; 0 leaves it to LiteRT.

        Raises:
            ArtifactError: the file or its sidecar is missing, corrupt or truncated.
            TargetError: LiteRT cannot load it.
            MissingExtraError: LiteRT is not installed.
        """
        return LiteRTModel(artifact_for(self.name, path), WORDS, threads)


class LiteRTModel(WorkerModel):
    """A .tflite file in LiteRT's interpreter; call it with float tensors, which become codes at the edges."""

    def entering(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        entering = []
        for x, grid in zip(inputs, self._grids[0], strict=True):
            scale_and_point = None if grid is None or not x.is_floating_point() else _tensors(*grid)
            codes = None if scale_and_point is None else xnnpack_kernels.quantize(x, *scale_and_point, -128, 127)
            entering.append(x if codes is None else codes)
        return entering

    def leaving(self, outputs: list[Tensor]) -> list[Tensor]:
        own = len(self._grids[1])
        values = [
            y if grid is None or y.dtype != torch.int8 else arithmetic.dequantize(y, *_tensors(*grid))
            for y, grid in zip(outputs, self._grids[1], strict=False)
        ]
        # The converter leaves in float what is nothing but the input's codes.
        codes = [
            y if y.dtype == torch.int8 else arithmetic.quantize(y, *_tensors(*grid), -128, 127)
            for y, grid in zip(outputs[own:], self.note["grids"], strict=False)
        ]
        return values + codes

    @cached_property
    def _grids(self) -> tuple[list[tuple[float, int] | None], list[tuple[float, int] | None]]:
        inputs, outputs = self.worker.call("grids", method="forward").value
        return inputs, outputs


def _tensors(scale: float, zero_point: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int8)
