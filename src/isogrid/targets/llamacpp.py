"""llama.cpp: language models as GGUF files, with block formats and activations that it quantises itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from isogrid.errors import TargetError
from isogrid.formats import Format, named_format
from isogrid.formats.ggml import BITNET_WEIGHT, ggml_name
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import SCHEMES, Scheme
from isogrid.planning.target import AttentionFormats
from isogrid.targets.artifact import Artifact, artifact_for
from isogrid.targets.llamacpp_cache import CacheTypes
from isogrid.targets.refusing import refuse_hadamard
from isogrid.targets.runtime import LoadedModel

ACTIVATIONS = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0", "iq4_nl", "mxfp4", "nvfp4", "q1_0", "q2_0"), "q8_0"),
    **dict.fromkeys(("q4_1", "q5_1"), "q8_1"),
    **dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0"), "q8_k"),
    "float16": "float16",
    "bfloat16": "bfloat16",
}
"""The activation rule that goes with a weight's format: `vec_dot_type` of `type_traits_cpu` in ggml-cpu.c."""

POSITIONS = frozenset(
    {"wpe", "position_embeddings", "position_embedding", "embed_positions", "token_type_embeddings"}
)
"""What models call the embeddings that llama.cpp never quantises."""

OF_THE_MODEL = object()
"""In place of a tokenizer: the one that the model has as an attribute, if any."""


class LlamaCpp:
    """The target `llamacpp`.

    Linear layers and embeddings are stored in ggml's block formats. A linear layer's input is quantised by llama.cpp in
    any case, as the weight's format decides, so that every scheme is a dynamic one.
    """

    name = "llamacpp"
    kernels = "ggml"
    float_endings: frozenset[str] = frozenset()
    fused_layers: tuple[tuple[str, ...], ...] = ()
    attention: AttentionFormats = CacheTypes()
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
        return replace(scheme, weight=BITNET_WEIGHT) if scheme.name == "bitnet" else scheme

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None for linear layers, also those of experts, and embeddings of tokens."""
        refuse_hadamard(call, "llama.cpp")
        if call.name.rpartition(".")[2] in POSITIONS:
            return "llama.cpp keeps embeddings of positions and of token types in float"
        is_table = call.kind == "embedding" and call.type != "EmbeddingBag"
        if is_table and ggml_name(named_format(scheme.weight)) == "nvfp4":
            return "NVFP4 has a scale of the whole tensor, and llama.cpp reads none for embeddings"
        if call.kind in ("linear", "experts") or is_table:
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

    def export(
        self,
        integer_model: nn.Module,
        plan: Plan,
        path: str | Path,
        *,
        tokenizer: Any = OF_THE_MODEL,
        base: str | Path | None = None,
    ) -> Artifact:
        """Write a GGUF file with its sidecar `<path>.json`.

        Args:
            integer_model: of `isogrid.convert`, a causal language model of transformers.
            plan: of the model.
            path: of the file.
            tokenizer: of transformers; the model's attribute `tokenizer` if not given. None writes a file without a
                vocabulary, which takes and gives numbers of tokens.
            base: a GGUF file of the float model that llama.cpp's converter made, in F32, F16 or BF16. The trained
                tensors take the places of its own, and everything else is kept.

        Raises:
            TargetError: llama.cpp does not know the model, the tokenizer or a format, or the base is of another model.
            ArtifactError: the base or the disk cannot be read or written.
        """
        from isogrid.targets.gguf_export import write_gguf

        if base is not None and tokenizer is not OF_THE_MODEL:
            raise TargetError("A base brings its own tokenizer: leave out tokenizer=.")
        chosen = getattr(integer_model, "tokenizer", None) if tokenizer is OF_THE_MODEL else tokenizer
        return write_gguf(integer_model, plan, Path(path), chosen, base)

    def load(self, path: str | Path | Artifact, threads: int = 0) -> LoadedModel:
        """The artefact in llama.cpp: its cache in float32, without flash attention.

        Raises:
            ArtifactError: the file or its sidecar is missing, corrupt or truncated.
            MissingExtraError: llama-cpp-python is not installed.
            TargetError: llama.cpp cannot load it.
        """
        from isogrid.targets.llamacpp_model import LlamaCppModel

        return LlamaCppModel(artifact_for(self.name, path), threads)


def _name(fmt: Format) -> str | None:
    """The key of ACTIVATIONS for a format, or None."""
    halves = (name for name in ("float16", "bfloat16") if named_format(name) == fmt)
    name = "tq2_0" if fmt == named_format(BITNET_WEIGHT) else ggml_name(fmt) or next(halves, None)
    return name if name in ACTIVATIONS else None
