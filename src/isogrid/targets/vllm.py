"""vLLM: language models as compressed-tensors checkpoints, which transformers runs too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from isogrid.errors import TargetError
from isogrid.formats import Format, IntegerGrid, NativeGrid, PerChannel, PerGroup
from isogrid.planning.fused import NVFP4
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import SCHEMES, Scheme
from isogrid.planning.target import AttentionFormats
from isogrid.targets.artifact import Artifact, artifact_for
from isogrid.targets.checkpoints.writing import write_checkpoint
from isogrid.targets.compressed_tensors.checkpoint import CompressedModel
from isogrid.targets.compressed_tensors.states import CheckpointStates, scale_tensors
from isogrid.targets.compressed_tensors.writing import configured, packed_tensors
from isogrid.targets.refusing import refuse_hadamard

STORED: dict[str, tuple[str, str | None]] = {
    "w2a16": ("int2/group128:scale=bfloat16", None),
    "w4a16": ("int4/group128:scale=bfloat16", None),
    "w8a16": ("int8/group128:scale=bfloat16", None),
    "w8a8": ("int8/channel", "int8/tensor"),
    "w8a8-dynamic": ("int8/channel", None),
    "nvfp4": ("nvfp4", "nvfp4-local"),
    "mxfp4": ("mxfp4", None),
}
"""Formats of weights and inputs of the schemes that other runtimes store otherwise; as llm-compressor's presets."""

RULES = {
    **dict.fromkeys(("int8/channel", "int8/tensor"), "int8-token"),
    **dict.fromkeys(("fp8_e4m3/channel", "fp8_e4m3/tensor"), "fp8-token"),
    "fp8_e4m3/tile128x128": "fp8-group128",
    "mxfp4": "mxfp4-group32",
}
"""What is done to inputs as they come, by the weight's format."""

INPUTS = ("int8/tensor", "fp8_e4m3/tensor", "nvfp4-local")
"""Formats of inputs with a scale that is calibrated; of the last one it is the scale of those that values choose."""

CUDA = "int8-token-cuda"
"""The rule of vLLM's own kernels for int8, which checkpoints cannot tell from that of compressed-tensors."""

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
"""What vLLM joins to one layer, by the names that transformers' models give the parts."""


class Vllm:
    """The target `vllm`: linear layers and experts, with weights of 2 to 8 bits, FP8, NVFP4 or MXFP4.

    Embeddings, heads and routers stay in the model's dtype, in which everything computes.
    """

    name = "vllm"
    kernels = "float"
    float_endings: frozenset[str] = frozenset()
    fused_layers: tuple[tuple[str, ...], ...] = FUSED
    attention: AttentionFormats = CheckpointStates()
    fuses_additions = False

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme as vLLM stores it, in groups of 128; raises TargetError for one that it does not run."""
        if scheme.target == self.name:
            return scheme
        if scheme.name not in STORED:
            own = ", ".join([*STORED, *(name for name, known in SCHEMES.items() if known.target == self.name)])
            raise TargetError(f"vLLM does not run scheme {scheme.name}. It runs {own}.")
        weight, activation = STORED[scheme.name]
        arithmetic = scheme.arithmetic if scheme.arithmetic == "weight_only" else "float"
        how: dict[str, Any] = {"arithmetic": arithmetic, "keeps_heads": True, "mixture": None, "falls_back": False}
        return replace(scheme, weight=weight, activation=activation, **how)

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None for linear layers and experts as transformers saves them."""
        refuse_hadamard(call, "vLLM's checkpoint")
        if call.type == "Conv1D":
            return "Conv1D stores its weight [in, out], and compressed-tensors packs [out, in] only"
        if call.type == "TurnedExperts":
            return "experts stored [in, out] have no packed form in compressed-tensors checkpoints"
        if call.kind in ("linear", "experts"):
            return None
        return f"compressed-tensors checkpoints quantise linear layers, and this is {call.type}"

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """A scale for each token, or for each 128 features where the weight has tiles."""
        rule = RULES.get(str(weight)) if scheme.arithmetic == "float" and scheme.activation is None else None
        return CUDA if rule == "int8-token" and scheme.name == "w8a8-dynamic-cuda" else rule

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where vLLM has no such format."""
        if kind == "activation":
            if str(fmt) not in INPUTS:
                raise TargetError(
                    f"{call.name!r}: vLLM's static inputs are {', '.join(INPUTS)}, not {fmt}; or "
                    "leave activation= out and use a dynamic scheme."
                )
            return
        if scheme.arithmetic == "float":
            if str(fmt) not in RULES and not str(fmt).startswith(f"{NVFP4}:"):
                raise TargetError(
                    f"{call.name!r}: scheme {scheme.name} multiplies weights stored as {', '.join(RULES)}, not {fmt}."
                )
        elif not (_is_packed(fmt) or str(fmt) == "mxfp4" or str(fmt).startswith(f"{NVFP4}:")):
            raise TargetError(
                f"{call.name!r}: under float activations vLLM takes int2 to int8 or uint4/uint8 by group or channel on "
                f"float scales, mxfp4 or nvfp4, not {fmt}. Use int4/group128:scale=bfloat16, say."
            )

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write a folder: config.json, safetensors, and the plan in isogrid.json.

        Args:
            integer_model: of `isogrid.convert`, a model of transformers.
            plan: of the model.
            path: of the folder; an older export there is replaced, but for a tokenizer and the like.

        Raises:
            TargetError: the model is none of transformers, or nothing in it is quantised.
        """
        return write_checkpoint(integer_model, plan, path, packed_tensors, configured, scale_tensors)

    def load(self, path: str | Path | Artifact, threads: int = 0) -> CompressedModel:
        """The checkpoint in transformers, which computes by the package compressed-tensors.

        Args:
            path: of the folder, or the artefact.
            threads: are those of torch; 0 leaves them.

        Raises:
            ArtifactError: the folder, or a file of it, is missing, corrupt or truncated.
            MissingExtraError: transformers or compressed-tensors is not installed.
        """
        return CompressedModel(artifact_for(self.name, path))


def _is_packed(fmt: Format) -> bool:
    """Whether a format is what `pack-quantized` stores and vLLM's kernels read."""
    grid, scale = fmt.grid, fmt.scale
    plain = isinstance(grid, IntegerGrid) and not grid.midrise and scale is not None and grid.bits >= 2
    known = fmt.granularity == PerChannel(0) or (isinstance(fmt.granularity, PerGroup) and fmt.granularity.axis == -1)
    return bool(plain and known and scale is not None and isinstance(scale.grid, NativeGrid))
