"""Language models of transformers, small and with random weights: by name, what their configurations are made with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

VOCABULARY = 128


@dataclass(frozen=True)
class LanguageModel:
    """One of the sweep.

    Attributes:
        build: makes it in float32.
        target: where it goes; `pytorch` for what no checkpoint of vLLM holds.
        decoder: whether a second sequence goes into a decoder.
    """

    build: Callable[[], nn.Module]
    target: str = "vllm"
    decoder: bool = False

    def inputs(self) -> dict[str, torch.Tensor]:
        """A batch of two sequences."""
        ids = torch.randint(3, VOCABULARY, (2, 12))
        return {"input_ids": ids, **({"decoder_input_ids": ids[:, :8]} if self.decoder else {})}


USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ONE_KIND_OF_HEAD = {**USUAL, "num_key_value_heads": 4}
CHOOSING = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
STATES = {"mamba_d_state": 8, "mamba_dt_rank": 8}
MIXED = ["conv", "full_attention"]
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK = {
    **ONE_KIND_OF_HEAD,
    **CHOOSING,
    **LATENT,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def _build(kind: str, auto: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model: nn.Module = getattr(transformers, auto).from_config(config)
    with torch.no_grad():  # the usual 0.02 leaves the experts of small models all alike
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    return model.eval()


def _causal(kind: str, options: dict[str, Any] | None = None, target: str = "vllm", **more: Any) -> LanguageModel:
    return LanguageModel(partial(_build, kind, "AutoModelForCausalLM", {**(options or USUAL), **more}), target)


def _other(kind: str, auto: str, options: dict[str, Any], decoder: bool = False) -> LanguageModel:
    return LanguageModel(partial(_build, kind, auto, options), decoder=decoder)


_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 1}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_ff": 96,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 2,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_BERT = {name: value for name, value in USUAL.items() if name not in ("num_key_value_heads", "head_dim")}

DENSE: dict[str, LanguageModel] = {
    "Llama": _causal("Llama"),
    "Mistral": _causal("Mistral"),
    "Qwen2": _causal("Qwen2"),
    "Qwen3": _causal("Qwen3"),
    "Gemma": _causal("Gemma"),
    "Gemma 2": _causal("Gemma2"),
    "Gemma 3": _causal("Gemma3Text"),
    "Phi": _causal("Phi"),
    "Phi-3": _causal("Phi3"),
    "GPT-2": _causal("GPT2", _GPT2, target="pytorch"),
    "GPT-J": _causal("GPTJ", {**_GPT2, "rotary_dim": 8}),
    "GPT-NeoX": _causal("GPTNeoX"),
    "Falcon": _causal("Falcon", {k: v for k, v in USUAL.items() if k not in ("head_dim", "num_key_value_heads")}),
    "OPT": _causal("OPT", {**_BERT, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Bloom": _causal("Bloom", {**_BERT, "n_layer": 2, "n_head": 4}),
    "OLMo": _causal("Olmo"),
    "OLMo 2": _causal("Olmo2"),
    "OLMo 3": _causal("Olmo3"),
    "StableLM": _causal("StableLm"),
    "StarCoder2": _causal("Starcoder2"),
    "Cohere": _causal("Cohere"),
    "Granite": _causal("Granite"),
    "Helium": _causal("Helium"),
    "SmolLM3": _causal("SmolLM3"),
    "GLM": _causal("Glm"),
    "GLM-4": _causal("Glm4"),
    "Nemotron": _causal("Nemotron"),
    "Persimmon": _causal("Persimmon", ONE_KIND_OF_HEAD),
    "EXAONE 4": _causal("Exaone4", sliding_window=8, sliding_window_pattern=2),
    "ERNIE 4.5": _causal("Ernie4_5"),
    "Arcee": _causal("Arcee"),
    "Apertus": _causal("Apertus"),
    "Mamba": _causal("Mamba", {**_BERT, "state_size": 8}),
}
EXPERTS: dict[str, LanguageModel] = {
    "Mixtral": _causal("Mixtral", num_local_experts=4),
    "Qwen2-MoE": _causal("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=64, **CHOOSING),
    "Qwen3-MoE": _causal("Qwen3Moe", num_experts=4, **CHOOSING),
    "gpt-oss": _causal("GptOss", num_local_experts=4, num_experts_per_tok=2, target="pytorch"),
    "OLMoE": _causal("Olmoe", num_experts=4, num_experts_per_tok=2),
    "Phi-3.5-MoE": _causal("Phimoe", num_local_experts=4),
    "Granite MoE": _causal("GraniteMoe", num_local_experts=4, num_experts_per_tok=2, target="pytorch"),
    "DeepSeek-V2": _causal("DeepseekV2", DEEPSEEK),
    "DeepSeek-V3": _causal("DeepseekV3", DEEPSEEK),
    "GLM-4.5": _causal("Glm4Moe", {**DEEPSEEK, "head_dim": 16}),
    "dots.llm1": _causal("Dots1", {**DEEPSEEK, "head_dim": 16, "n_shared_experts": 1}),
    "ERNIE 4.5 MoE": _causal("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=32),
    "FlexOlmo": _causal("FlexOlmo", num_experts=4, num_experts_per_tok=2),
    "Jamba": _causal(
        "Jamba", num_experts=4, mamba_d_state=8, mamba_dt_rank=8, attn_layer_period=2, attn_layer_offset=1
    ),
    "LFM2-MoE": _causal(
        "Lfm2Moe", num_experts=4, num_dense_layers=1, layer_types=["conv", "full_attention"], **CHOOSING
    ),
}
OTHERS: dict[str, LanguageModel] = {
    "BERT": _other("Bert", "AutoModelForMaskedLM", _BERT),
    "RoBERTa": _other("Roberta", "AutoModelForMaskedLM", _BERT),
    "ModernBERT": _other("ModernBert", "AutoModelForMaskedLM", _BERT),
    "T5": _other("T5", "AutoModelForSeq2SeqLM", _T5, decoder=True),
    "BART": _other("Bart", "AutoModelForSeq2SeqLM", _BART, decoder=True),
    "Pegasus": _other("Pegasus", "AutoModelForSeq2SeqLM", _BART, decoder=True),
}

LANGUAGE = {**DENSE, **EXPERTS, **OTHERS}
"""All of them by name."""
