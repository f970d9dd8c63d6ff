"""Rotary embeddings in GGUF files: how far llama.cpp turns queries and keys, stretched or not."""

from collections.abc import Mapping
from math import log, pi, sqrt
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import TargetError

KINDS = ("default", "linear", "llama3", "longrope", "yarn")
"""What is written, by transformers' names."""

BETAS = {"beta_fast": 32, "beta_slow": 1}
"""YaRN's ramp; llama.cpp reads another from the files of few families, none of those that are written directly."""


def rotation(config: Any, head: int) -> dict[str, Any]:
    """The keys of a file, without the architecture's name; none where positions are learned.

    Args:
        config: of transformers.
        head: size of a head.

    Raises:
        TargetError: llama.cpp turns by other angles than this configuration says.
    """
    rope = _rope(config)
    if not rope:
        return {}
    found: dict[str, Any] = {
        "rope.dimension_count": _turned(config, rope, head),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    local = config.rope_parameters.get("sliding_attention")
    if local is not None:
        if local["rope_type"] != "default":
            raise TargetError(f"llama.cpp does not stretch local rotary embeddings; this model has {local}.")
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind not in KINDS:
        raise TargetError(f"The rotary embedding {kind!r} is not written directly. Export with base=, see the docs.")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        found |= _yarn(rope)
    if kind == "longrope":
        found |= {"rope.scaling.type": kind, **_long(config, rope)}
    return found


def rotation_factors(config: Any) -> dict[str, Tensor]:
    """Tensors of the file that stretch rotary embeddings, float32 by name; none for most models."""
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config, rope)}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    return {}


def _rope(config: Any) -> Mapping[str, Any]:
    """The rotary embedding of the layers with full attention; empty where positions are learned."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    full: Mapping[str, Any] = rope.get("full_attention", rope)
    return full


def _turned(config: Any, rope: Mapping[str, Any], head: int) -> int:
    """How many values of a head are turned."""
    return int(head * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0))


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    if not rope.get("truncate", True):
        raise TargetError(
            "llama.cpp rounds the ends of YaRN's ramp to whole dimensions, and this model's truncate=False does not. "
            "Set model.config.rope_parameters['truncate'] = True before the model is built, and train it so."
        )
    for name, known in BETAS.items():
        if (rope.get(name) or known) != known:
            raise TargetError(f"llama.cpp has YaRN with {name} = {known} alone for this family, not with {rope[name]}.")
    found: dict[str, Any] = {"rope.scaling.original_context_length": int(rope["original_max_position_embeddings"])}
    # llama.cpp multiplies by what YaRN recommends for the factor in any case.
    share = _yarn_attention(rope) / _recommended(rope["factor"])
    if share != 1.0:
        found["rope.scaling.attn_factor"] = share
    return found


def _yarn_attention(rope: Mapping[str, Any]) -> float:
    """By how much YaRN multiplies queries and keys, as transformers has it."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    one, all_dimensions = rope.get("mscale"), rope.get("mscale_all_dim")
    if one and all_dimensions:
        return _recommended(rope["factor"], one) / _recommended(rope["factor"], all_dimensions)
    return _recommended(rope["factor"])


def _recommended(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * log(factor) + 1.0 if factor > 1 else 1.0


def _long(config: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    original = int(rope["original_max_position_embeddings"])
    stretch = rope.get("factor") or config.max_position_embeddings / original
    attention = rope.get("attention_factor")
    if attention is None:
        attention = sqrt(1 + log(stretch) / log(original)) if stretch > 1 else 1.0
    return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float(attention)}


def _llama3_factors(config: Any, rope: Mapping[str, Any]) -> Tensor:
    """By how much each frequency is slowed down: not where waves are short, by `factor` where they are long."""
    head = _turned(config, rope, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * pi / frequencies)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors
