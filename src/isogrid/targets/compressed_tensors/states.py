"""The key-value cache of a checkpoint: one format for all layers, with scales that vLLM and transformers read.

compressed-tensors calls it `kv_cache_scheme`, and a scheme of attention layers where queries are quantised too. vLLM
takes 8-bit floats with a static scale for a tensor or for a head (`CompressedTensorsKVCacheMethod`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import TargetError
from isogrid.formats import Format, PerHead, PerTensor, named_format
from isogrid.layers.attention_states import KEY, QUERY, VALUE, StoredStates
from isogrid.layers.stored import StoredInput
from isogrid.planning.graph import Call
from isogrid.planning.target import StateChoice

NAMES = {QUERY: "q_scale", KEY: "k_scale", VALUE: "v_scale"}
"""What scales are called in files, within the attention layer."""

PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
"""An attention layer that compressed-tensors knows has one of these (`is_cached_attention_module`)."""

_KNOWN = "fp8_e4m3/tensor or fp8_e4m3/head, with scale=bfloat16 or scale=float16 where the model has that dtype"


class CheckpointStates:
    """What vLLM reads of a checkpoint."""

    turns_states = False

    def chosen(self, asked: Mapping[str, StateChoice], states: Sequence[Call]) -> Mapping[str, StateChoice]:
        """What was asked for; raises TargetError unless it is one static FP8 format for all layers' keys and values."""
        for name, choice in asked.items():
            if not _is_static_fp8(named_format(choice.format)):
                raise TargetError(f"{name!r}: vLLM caches {_KNOWN}, and not {choice.format}.")
        formats = sorted({choice.format for choice in asked.values()})
        if len(formats) > 1:
            raise TargetError(
                f"A checkpoint has one format for the whole cache, and rules ask for {' and '.join(formats)}."
            )
        kinds = {choice.call.kind for choice in asked.values()}
        needed = {KEY, VALUE, *kinds} if asked else set()
        if missing := [call.name for call in states if call.kind in needed and call.name not in asked]:
            raise TargetError(
                f"A checkpoint has one format for the keys and values of all layers, and no rule asks for "
                f"{', '.join(missing)}. Match them all, by match='key_cache' and match='value_cache'."
            )
        return asked

    def why_float(self, call: Call) -> str:
        """No rule names it."""
        if call.kind == QUERY:
            return "no rule names it; attention backends that multiply in FP8 quantise queries, by a scale of 1"
        return f"no rule names it; match={call.kind!r} with activation='fp8_e4m3/tensor' quantises it"


def cache_arguments(model: nn.Module) -> dict[str, Any] | None:
    """`kv_cache_scheme` of a converted model, or None where its cache is float."""
    fmt = next((grid.format for kinds in _states(model).values() for grid in kinds.values()), None)
    if fmt is None:
        return None
    strategy = "attn_head" if isinstance(fmt.granularity, PerHead) else "tensor"
    return {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, "group_size": None,
    }  # fmt: skip


def attention_group(model: nn.Module) -> dict[str, Any] | None:
    """The entry of `config_groups` of attention layers whose queries are quantised, or None where none are."""
    paths = [path for path, kinds in _states(model).items() if QUERY in kinds]
    if not paths:
        return None
    return {"targets": paths, "weights": None, "input_activations": cache_arguments(model), "output_activations": None}


def scale_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The scales of a converted model's cache by their names in a file, in the model's dtype, in which they are read.

    Raises:
        TargetError: a scale cannot be stored so, or compressed-tensors does not know the attention layer.
    """
    found = {}
    for path, kinds in _states(model).items():
        layer = model.get_submodule(path)
        if "attention" not in type(layer).__name__.lower() or not any(hasattr(layer, name) for name in PROJECTIONS):
            raise TargetError(
                f"compressed-tensors finds no key-value cache in {path!r}, a {type(layer).__name__} without "
                f"{', '.join(PROJECTIONS[:3])}. Keep its states float."
            )
        for kind, grid in kinds.items():
            scale = grid.scale.to(dtype)
            if not torch.equal(scale.float(), grid.scale):
                raise TargetError(
                    f"The scales of {path}.{kind} cannot be stored in {dtype}, the dtype of the model. Train on scales "
                    f"of that dtype, by activation='{grid.format}:scale={str(dtype).removeprefix('torch.')}'."
                )
            shape = (-1, 1, 1) if isinstance(grid.format.granularity, PerHead) else (1,)
            found[f"{path}.{NAMES[kind]}"] = scale.reshape(shape)
    return found


def _states(model: nn.Module) -> dict[str, dict[str, StoredInput]]:
    """The grids of each attention layer by its path, then by kind."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, StoredStates):
            grids = {kind: grid for kind, grid in module._modules.items() if isinstance(grid, StoredInput)}
            found[name.rpartition(".")[0]] = grids
    return found


def _is_static_fp8(fmt: Format) -> bool:
    is_fp8 = fmt.grid == named_format("fp8_e4m3/tensor").grid and fmt.scale is not None and fmt.is_symmetric
    return bool(is_fp8) and isinstance(fmt.granularity, PerTensor | PerHead)
