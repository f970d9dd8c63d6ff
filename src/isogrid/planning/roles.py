"""What the layers of a language model do, told by their paths: mixtures of types go by it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal[
    "output", "embedding", "attention_qkv", "attention_v", "attention_k", "attention_q", "attention_output",
    "ffn_down", "ffn_gate", "ffn_up", "other",
]  # fmt: skip
"""The categories of llama.cpp (`tensor_get_category` in llama-quant.cpp)."""


@dataclass(frozen=True)
class Weight:
    """A weight of a linear layer or embedding that is to be stored.

    Attributes:
        path: of the layer.
        kind: linear, experts or embedding.
        shape: [out, in], or [entries, dimension].
        owner: path of the first layer that has the same weight, usually this one.
        experts: how many there are, where it is the weight of experts.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    owner: str
    experts: int = 1


_OUTPUTS = r"lm_head|output|embed_out|head|unembed"
# Parents decide about names that attention and feed-forward layers share.
_ATTENTION, _FEED_FORWARD = r"\w*(?:attn|attention)\w*", r"\w*(?:mlp|ffn|ff|feed_forward|experts?)\w*"
_PATTERNS: tuple[tuple[Role, str], ...] = (
    ("attention_qkv", r"qkv_proj|c_attn|query_key_value|W?qkv|qkv|in_proj|attn_qkv"),
    ("attention_v", r"v_proj|v_lin|value|wv|to_v|attn_v"),
    ("attention_k", r"k_proj|k_lin|key|wk|to_k|attn_k"),
    ("attention_q", r"q_proj|q_lin|query|wq|to_q|attn_q"),
    ("attention_output", rf"o_proj|wo|attn_output|{_ATTENTION}\.(?:dense|out_proj|out_lin|c_proj|to_out)"),
    ("ffn_down", rf"down_proj(?:ection)?|w2|fc2|fc_out|dense_4h_to_h|ffn_down\w*|{_FEED_FORWARD}\.(?:c_proj|down)"),
    ("ffn_gate", r"gate_proj|w1|ffn_gate\w*"),
    ("ffn_up", r"(?:gate_)?up_proj(?:ection)?|w3|fc1|fc_in|c_fc|dense_h_to_4h|ffn_up\w*"),
)
_TAKEN_APART = r"(?:\.linear)?"  # GPT-2's Conv1D has the product as a child


def role_of(weight: Weight, tied: frozenset[str] = frozenset()) -> Role:
    """The role of a layer; `other` where its path does not tell.

    Args:
        weight: of the layer.
        tied: paths of embeddings whose table is also an output layer's weight.

    >>> role_of(Weight("model.layers.3.mlp.down_proj", "linear", (64, 256), "model.layers.3.mlp.down_proj"))
    'ffn_down'
    """
    if weight.kind == "embedding":
        return "embedding"
    if weight.owner in tied or re.fullmatch(rf"(?:.*\.)?(?:{_OUTPUTS})", weight.path):
        return "output"
    for role, pattern in _PATTERNS:
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern}){_TAKEN_APART}", weight.path):
            return role
    return "other"


def tied_embeddings(weights: Sequence[Weight]) -> frozenset[str]:
    """The embeddings whose table is also the weight of a linear layer, by the path of the first layer that has it."""
    tables = {weight.owner for weight in weights if weight.kind == "embedding"}
    return frozenset(tables & {weight.owner for weight in weights if weight.kind != "embedding"})


def block_of(path: str) -> int | None:
    """The number of the block that a layer belongs to: the first number in its path.

    >>> block_of("transformer.h.11.attn.c_attn")
    11
    """
    number = next((part for part in path.split(".") if part.isdigit()), None)
    return None if number is None else int(number)
