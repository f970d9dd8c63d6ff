"""Tiny language models with random weights, one of each family that is written as GGUF directly."""

from typing import Any

import torch
import transformers
from torch import nn

import isogrid as ig

VOCABULARY = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "use_cache": False,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 8, "tie_word_embeddings": True, "head_dim": 64}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
GPT_OSS = {"head_dim": 64, "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
SPECIFIC: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"head_dim": 128, "attention_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"head_dim": 64, "sliding_window": 48}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 64, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 64, "moe_intermediate_size": 256}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**EXPERTS, **GPT_OSS}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GEMMA, "attn_implementation": "eager"}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_positions": 64}),
}
STRETCHED: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"factor": 4.0}),
    "llama3": ("llama", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "yarn": ("qwen2", {"factor": 4.0}),
    "longrope": (
        "phi3",
        {"long_factor": [1 + 0.1 * i for i in range(32)], "short_factor": [1 + 0.02 * i for i in range(32)]},
    ),
}
"""Rotary embeddings that are stretched from 16 tokens to 64: a family that has them, and their parameters."""
RENAMED = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}


def language_model(family: str, **options: Any) -> nn.Module:
    """A float model whose norms and biases are not what they start as."""
    torch.manual_seed(0)
    model_type, config_type, specific = SPECIFIC[family]
    sizes = {**SIZES, **specific, **options}
    if family == "gpt2":
        kept = ("vocab_size", "use_cache", "bos_token_id", "eos_token_id", "n_positions")
        sizes = {name: sizes[name] for name in kept} | {new: sizes[old] for old, new in RENAMED.items()}
    model: nn.Module = getattr(transformers, model_type)(getattr(transformers, config_type)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(2)
    return model


def stretched_model(name: str, **rope: Any) -> nn.Module:
    """A float model with one of these rotary embeddings, changed where asked."""
    family, known = STRETCHED[name]
    parameters = {"rope_type": name, "rope_theta": 1e4, "original_max_position_embeddings": 16, **known, **rope}
    more = {"original_max_position_embeddings": 16} if family == "phi3" else {}
    return language_model(family, rope_parameters=parameters, **more)


def tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    """Random ones."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def prepared_model(family: str, weight: str, rules: Any = (), range: str = "mse", **options: Any) -> nn.Module:
    """A model with all weights in one format of llama.cpp's; absmax is the range that takes no time."""
    model = language_model(family, **options)
    rules = [*rules, ig.Rule(match="*", weight=weight, range=range)]
    return ig.prepare(model, ig.plan(model, scheme="q8_0", rules=rules, example_inputs={"input_ids": tokens()}))
