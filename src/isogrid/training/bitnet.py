"""From a language model to one of BitNet's structure."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from isogrid.errors import PlanError
from isogrid.layers.bitnet import BitLinear
from isogrid.layers.layer import replacement
from isogrid.planning.state import is_prepared

PRE_NORMS = {
    "*.input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "*.post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The norms of a block in the Llama family, and the layers of the block that read them."""


def to_bitnet(model: nn.Module, skip: Sequence[str] = ("lm_head",)) -> nn.Module:
    """Turn a float model of the Llama family into one of BitNet's structure, in place.

    Every Linear becomes a `BitLinear`, which normalises its own input; the norms of the blocks, which did that before,
    are left out, and their gains go into the weights that followed. What the layers behind them compute stays the
    same; the output projection and the down projection read normalised inputs from now on, so that the model has to
    be trained. Embeddings, the last norm and the layers to skip stay as they are.

    Args:
        model: of transformers, whose blocks have `input_layernorm` and `post_attention_layernorm`.
        skip: names of linear layers, wildcards allowed, that stay as they are.

    Returns:
        The model.

    Raises:
        PlanError: the model is prepared already, is built otherwise, or a layer has a bias.
    """
    if is_prepared(model):
        raise PlanError("The model is prepared already. Call isogrid.to_bitnet on the float model.")
    modules = dict(model.named_modules())
    linears = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and not any(fnmatchcase(name, pattern) for pattern in skip)
    }
    biased = next((name for name, module in linears.items() if module.bias is not None), None)
    if biased is not None:
        raise PlanError(f"{biased!r} has a bias, and BitNet has none. Use a model without, or name the layer in skip.")
    norms = {name: readers for name in modules for pattern, readers in PRE_NORMS.items() if fnmatchcase(name, pattern)}
    if not norms or not linears:
        raise PlanError(
            f"{type(model).__name__} has no blocks with input_layernorm and post_attention_layernorm before linear "
            "layers, as the Llama family has them. Build it with isogrid.BitLinear and without norms before them."
        )
    for name, readers in norms.items():
        block = name.rpartition(".")[0]
        _check_readers(block, readers, linears)
        eps = _leave_out(model, name, [linears[f"{block}.{reader}"] for reader in readers])
    for name, linear in linears.items():
        bit_linear = replacement(linear, BitLinear)
        bit_linear.eps = eps
        _set(model, name, bit_linear)
    return model


def _check_readers(block: str, readers: Sequence[str], linears: dict[str, nn.Linear]) -> None:
    missing = next((reader for reader in readers if f"{block}.{reader}" not in linears), None)
    if missing is not None:
        raise PlanError(
            f"The block {block!r} has no linear layer {missing!r}, or it is skipped, and its norm would be lost. "
            "isogrid.to_bitnet knows the blocks of the Llama family."
        )


@torch.no_grad()
def _leave_out(model: nn.Module, name: str, readers: Sequence[nn.Linear]) -> float:
    """Take a norm out and put its gain into the weights that read it; returns its eps."""
    norm: Any = model.get_submodule(name)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    x = torch.linspace(-1.0, 2.0, readers[0].in_features, dtype=torch.float32)[None]
    if eps is None or not torch.allclose(norm.float()(x), F.rms_norm(x, x.shape[1:], norm.weight.float(), eps)):
        raise PlanError(f"{name!r} is a {type(norm).__name__}, not an RMSNorm with a gain. BitNet has RMSNorm.")
    for reader in readers:
        reader.weight.mul_(norm.weight.to(reader.weight.dtype))
    _set(model, name, nn.Identity())
    return float(eps)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
