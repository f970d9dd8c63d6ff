"""The families of models that are written as GGUF files directly: what llama.cpp wants to know about each.

Keys and conventions are those of llama.cpp's own converter, conversion/*.py beside its convert_hf_to_gguf.py; what
each architecture reads back is in its src/models/*.cpp.
"""

from dataclasses import dataclass
from typing import Any

from isogrid.errors import TargetError
from isogrid.targets.gguf_experts import experts_in
from isogrid.targets.gguf_rotation import rotation

Metadata = dict[str, Any]
"""Values by GGUF keys: bool, int, float, str and lists of these."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a family of models.

    Attributes:
        name: in GGUF files.
        activation: the only one that it has for the family's feed-forward layers, by transformers' names.
        rotates_pairs: rotary embeddings turn neighbouring rows of queries and keys, so that rows change places.
        adds_one_to_norms: norms multiply by one plus their parameter; files hold the sum.
        window: what it does with sliding windows: "pattern" has them for some layers, "none" ignores them.
        writes_head_sizes: whether the size of a head is written, which may not be hidden size / heads.
        has_head: whether a file may hold an output layer of its own, beside the embedding.
        interleaves_gates: experts' gates and what they gate lie row by row beside each other in checkpoints.
    """

    name: str
    activation: str = "silu"
    rotates_pairs: bool = False
    adds_one_to_norms: bool = False
    window: str = "none"
    writes_head_sizes: bool = True
    has_head: bool = True
    interleaves_gates: bool = False


_GELU = "gelu_pytorch_tanh"

ARCHITECTURES = {
    "llama": Architecture("llama", rotates_pairs=True),
    "mistral": Architecture("llama", rotates_pairs=True),
    "mixtral": Architecture("llama", rotates_pairs=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gpt_oss": Architecture("gpt-oss", window="pattern", interleaves_gates=True),
    "phi3": Architecture("phi3", writes_head_sizes=False),
    "gemma2": Architecture("gemma2", _GELU, adds_one_to_norms=True, window="pattern", has_head=False),
    "gemma3_text": Architecture("gemma3", _GELU, adds_one_to_norms=True, window="pattern"),
    "gpt2": Architecture("gpt2", "gelu_new", writes_head_sizes=False),
}
"""By transformers' `config.model_type`."""


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model; raises TargetError, with what to do, where files are not written directly."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise TargetError(
            f"GGUF files are written directly for {', '.join(ARCHITECTURES)}, not for {kind or 'this model'}. Let "
            "llama.cpp's convert_hf_to_gguf.py write the float model with --outtype f16, and export with "
            "isogrid.export(model, path, base='float.gguf'): the trained weights then take the places of its tensors."
        )
    return ARCHITECTURES[kind]


def metadata_of(config: Any, architecture: Architecture) -> Metadata:
    """What llama.cpp must know of a model to compute it, without its tokenizer.

    Args:
        config: of transformers.
        architecture: of `architecture_of`.

    Raises:
        TargetError: llama.cpp computes something else than this configuration says; the message names it.
    """
    _check(config, architecture)
    heads, width = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    found: Metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": _context_length(config, architecture),
        "embedding_length": width,
        "feed_forward_length": inner or 4 * width,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "vocab_size": config.vocab_size,
    }
    epsilon = getattr(config, "rms_norm_eps", None)
    if epsilon is None:
        found["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
    else:
        found["attention.layer_norm_rms_epsilon"] = float(epsilon)
    if architecture.writes_head_sizes:
        found |= {"attention.key_length": head, "attention.value_length": head}
    for name, key in (("attn_logit_softcapping", "attn"), ("final_logit_softcapping", "final")):
        if getattr(config, name, None):
            found[f"{key}_logit_softcapping"] = float(getattr(config, name))
    if experts_in(config):
        found |= _experts(config)
    if architecture.window == "pattern":
        found |= _windows(config)
    elif architecture.name == "phi3":
        found["attention.sliding_window"] = 0  # without it, the converter's way to mark other models
    return {f"{architecture.name}.{key}": value for key, value in (found | rotation(config, head)).items()}


def _check(config: Any, architecture: Architecture) -> None:
    name = next((n for n in ("hidden_act", "hidden_activation", "activation_function") if hasattr(config, n)), None)
    activation = architecture.activation if name is None else getattr(config, name)
    same = {_GELU, "gelu_new"}
    if activation != architecture.activation and not {activation, architecture.activation} <= same:
        raise TargetError(
            f"llama.cpp computes {architecture.name} with {architecture.activation}; here {name} is {activation}."
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) or not getattr(config, "scale_attn_weights", True):
        raise TargetError("llama.cpp scales GPT-2's scores by 1 / sqrt(head size) alone; this configuration does not.")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != config.head_dim and not _is_gemma_27b(config, architecture):
        raise TargetError(
            f"llama.cpp scales scores of {architecture.name} by 1 / sqrt({config.head_dim}), the size of a head; this "
            f"model's query_pre_attn_scalar is {scalar}."
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise TargetError("llama.cpp computes causal attention for this architecture; this model's is bidirectional.")


def _is_gemma_27b(config: Any, architecture: Architecture) -> bool:
    layers = {"gemma2": 46, "gemma3": 62}.get(architecture.name)
    scalar = config.hidden_size // config.num_attention_heads
    return bool(config.num_hidden_layers == layers and config.query_pre_attn_scalar == scalar)


def _context_length(config: Any, architecture: Architecture) -> int:
    """The length up to which llama.cpp computes what the model does: a sliding window that it ignores ends it."""
    length = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    used = window is not None and getattr(config, "use_sliding_window", True) and architecture.window == "none"
    return min(length, int(window)) if used and window is not None else length


def _experts(config: Any) -> Metadata:
    """How many experts there are and are chosen; raises TargetError where llama.cpp mixes them otherwise."""
    expected = {"norm_topk_prob": True, "decoder_sparse_step": 1, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    for name, value in expected.items():
        if getattr(config, name, value) != value:
            raise TargetError(f"llama.cpp mixes the experts of {config.model_type} with {name} = {value} only.")
    if getattr(config, "mlp_only_layers", None):
        raise TargetError("llama.cpp has experts in every block; here mlp_only_layers leaves some without.")
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return {
        "expert_count": experts_in(config),
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": width,
    }


def _windows(config: Any) -> Metadata:
    kinds = [kind == "sliding_attention" for kind in config.layer_types]
    return {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": kinds}
