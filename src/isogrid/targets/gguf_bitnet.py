"""BitNet in GGUF files: a Llama whose linear layers normalise their inputs, in llama.cpp's architecture `bitnet`.

llama.cpp has the norms in four places of a block, with gains (src/models/bitnet.cpp): before the projections of
queries, keys and values, which read the same; before that of the output; before gate and up; and before down.
`BitLinear` has no gain, so that these are ones.
"""

from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import TargetError
from isogrid.layers.bitnet import BitLinear
from isogrid.targets.gguf_architectures import Architecture

BITNET = Architecture("bitnet", has_head=False)


def is_bitnet(model: nn.Module) -> bool:
    """Whether a model, float or converted, was made by `isogrid.to_bitnet`.

    Raises:
        TargetError: llama.cpp has no such model: head and embedding differ, or the norms have another eps.
    """
    found = [part for module in model.modules() for part in (module, getattr(module, "own", None))]
    layers = [part for part in found if isinstance(part, BitLinear)]
    if not layers:
        return False
    config: Any = model.config
    if not config.tie_word_embeddings:
        raise TargetError(
            "llama.cpp's BitNet reads the output layer from the embedding, and this model has one of its own. Train a "
            "model with tie_word_embeddings=True."
        )
    if {layer.eps for layer in layers} != {config.rms_norm_eps}:
        raise TargetError("llama.cpp's BitNet has one eps for all norms; those of this model differ.")
    return True


def norms_of(config: Any) -> dict[str, Tensor]:
    """The gains of the norms in front of linear layers, float32 by their names in the file."""
    width = {"attn_norm": config.hidden_size, "attn_sub_norm": config.hidden_size,
             "ffn_norm": config.hidden_size, "ffn_sub_norm": config.intermediate_size}  # fmt: skip
    return {
        f"blk.{block}.{name}.weight": torch.ones(size)
        for block in range(config.num_hidden_layers)
        for name, size in width.items()
    }
