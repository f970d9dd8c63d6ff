"""llama.cpp: language models as GGUF files, with block formats and activations that it quantises itself."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from isogrid.errors import TargetError
from isogrid.formats import Format, named_format
from isogrid.formats.ggml import ggml_name
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import SCHEMES, Scheme
from isogrid.targets.artifact import Artifact
from isogrid.targets.runtime import LoadedModel

ACTIVATIONS = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0", "iq4_nl", "mxfp4", "nvfp4", "q1_0", "q2_0"), "q8_0"),
    **dict.fromkeys(("q4_1", "q5_1"), "q8_1"),
    **dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0"), "q8_k"),
    "float16": "float16",
    "bfloat16": "bfloat16",
}
"""The activation rule that goes with a weight's format: `vec_dot_type` of `type_traits_cpu` in ggml-cpu.c."""

TERNARY = "ternary/tensor:scale=float16"
"""A weight of BitNet, as blocks of TQ2_0 or TQ1_0 that all have the same scale hold it."""


POSITIONS = frozenset(
    {"wpe", "position_embeddings", "position_embedding", "embed_positions", "token_type_embeddings"}
)
"""What models call the embeddings that llama.cpp never quantises."""


class LlamaCpp:
    """The target `llamacpp`.

    Linear layers and embeddings are stored in ggml's block formats. A linear layer's input is quantised by llama.cpp in
    any case, as the weight's format decides, so that every scheme is a dynamic one.
    """

    name = "llamacpp"
    kernels = "float"
    float_endings: frozenset[str] = frozenset()
    fused_layers: tuple[tuple[str, ...], ...] = ()
    fuses_additions = False

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme itself; raises TargetError for one that keeps activations float, or has static integers."""
        if scheme.arithmetic != "dynamic":
            own = ", ".join(name for name, known in SCHEMES.items() if known.target == self.name)
            raise TargetError(
                f"llama.cpp quantises activations as they come, and scheme {scheme.name} is {scheme.arithmetic}. "
                f"Use one of its own: {own}."
            )
        # One float32 scale for a whole weight becomes the float16 scale of every block.
        return replace(scheme, weight=TERNARY) if scheme.name == "bitnet" else scheme

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None for linear layers and embeddings of tokens."""
        if call.name.rpartition(".")[2] in POSITIONS:
            return "llama.cpp keeps embeddings of positions and of token types in float"
        if call.kind == "linear" or call.type == "Embedding":
            return None
        return f"llama.cpp's block formats store linear layers and embeddings, and this is {call.type}"

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """By the format of the weight."""
        name = _name(weight)
        return None if name is None else ACTIVATIONS[name]

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError where llama.cpp has no such format."""
        if kind == "activation":
            raise TargetError(
                f"{call.name!r}: llama.cpp quantises activations by the weight's format; leave out activation={fmt}."
            )
        if _name(fmt) is None:
            raise TargetError(f"{call.name!r}: llama.cpp stores weights as {', '.join(ACTIVATIONS)}, not as {fmt}.")

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Not there yet; raises TargetError."""
        raise TargetError("GGUF files are not written yet.")

    def load(self, path: str | Path | Artifact, threads: int = 0) -> LoadedModel:
        """Not there yet; raises TargetError."""
        raise TargetError("GGUF files are not loaded yet.")


def _name(fmt: Format) -> str | None:
    """The key of ACTIVATIONS for a format, or None."""
    halves = (name for name in ("float16", "bfloat16") if named_format(name) == fmt)
    name = "tq2_0" if fmt == named_format(TERNARY) else ggml_name(fmt) or next(halves, None)
    return name if name in ACTIVATIONS else None
