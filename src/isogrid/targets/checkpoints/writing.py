"""A converted model as a folder that transformers loads, and what serves its checkpoints."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import TargetError
from isogrid.layers.attention_states import StoredStates
from isogrid.layers.experts import StoredExperts
from isogrid.layers.stored import StoredLinear
from isogrid.planning.plan import Plan
from isogrid.planning.state import STEP_NAME
from isogrid.targets.artifact import Artifact, versions_of, write_folder
from isogrid.targets.checkpoints.rows import Rows, converted, weight_name

SHARD = "5GB"
"""The most that one file of tensors holds, as transformers has it."""


Layers = Mapping[str, StoredLinear]
Pack = Callable[[StoredLinear, Tensor, torch.dtype], Mapping[str, Tensor]]
"""The tensors of some rows of a layer, by their names within it, for a model of a dtype."""
Configure = Callable[[nn.Module, Layers, Rows], Any]
"""The `quantization_config` of a model, given its quantised layers and which rows of them lie where."""
States = Callable[[nn.Module, torch.dtype], Mapping[str, Tensor]]
"""The tensors of a model's key-value cache by their names, for a dtype."""


def no_states(model: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """None, where the cache is float."""
    return {}


def write_checkpoint(
    integer_model: nn.Module,
    plan: Plan,
    path: str | Path,
    pack: Pack,
    configure: Configure,
    states: States = no_states,
) -> Artifact:
    """Write config.json, safetensors and the sidecar; the folder appears whole or not at all.

    Raises:
        TargetError: the model is none of transformers, or nothing in it is quantised for this target.
        ArtifactError: the folder cannot be written.
    """
    model: Any = integer_model
    if not hasattr(integer_model, "config") or not hasattr(integer_model, "save_pretrained"):
        raise TargetError(
            f"A checkpoint for {plan.target} is one of a model of transformers, with its config; this is a "
            f"{type(integer_model).__name__}. Use another target, such as onnxruntime."
        )
    stored = {name: module for name, module in integer_model.named_modules() if isinstance(module, StoredLinear)}
    if not stored:
        raise TargetError(f"Nothing in this model is quantised, so there is nothing to write for {plan.target}.")
    tensors, rows = checkpoint_tensors(integer_model, stored, pack, states)
    config = {**model.config.to_dict(), "architectures": [type(integer_model).__name__]}
    config["quantization_config"] = configure(integer_model, stored, rows)

    def write(folder: Path) -> None:
        for name in ("generation_config", "tokenizer"):
            part: Any = getattr(model, name, None)
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(str(folder))
        write_tensors(folder, tensors)
        # Through the config's own JSON: it writes dtypes and nested configs as transformers reads them.
        own = json.loads(model.config.to_json_string(use_diff=False))
        if own.get("dtype") is None:  # a model made from its config has none, and decompressors then choose another one
            own["dtype"] = str(model.dtype).removeprefix("torch.")
        text = json.dumps({**own, **{key: config[key] for key in ("architectures", "quantization_config")}}, indent=2)
        (folder / "config.json").write_text(text, encoding="utf-8")

    versions = versions_of("torch", "transformers")
    return write_folder(Artifact(Path(path), plan.target, {}, plan, versions, ""), write)


def checkpoint_tensors(
    model: nn.Module, stored: Layers, pack: Pack, states: States = no_states
) -> tuple[dict[str, Tensor], Rows]:
    """All tensors of a checkpoint by their names on disk, and which rows of which weight lie where."""
    caches = [name for name, module in model.named_modules() if isinstance(module, StoredStates)]
    inside = tuple(f"{path}." for path in (*stored, *caches))
    plain: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if name == STEP_NAME or (name.startswith(inside) and not name.endswith(".bias")) or key in seen:
            continue  # tied tensors are stored once
        seen.add(key)
        plain[name] = tensor
    weights = {weight_name(path): _row_shape(module) for path, module in stored.items()}
    sources = {weight_name(path): module for path, module in stored.items()}
    on_disk = converted(model, plain, weights)
    tensors = dict(on_disk.plain)
    float_model: Any = model
    dtype: torch.dtype = float_model.dtype
    for prefix, (source, rows) in on_disk.rows.items():
        module = sources[source]
        for name, tensor in pack(module, rows, dtype).items():
            tensors[f"{prefix}.{name}"] = tensor
    tensors |= states(model, dtype)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, on_disk.rows


def _row_shape(module: StoredLinear) -> tuple[int, ...]:
    stack: Any = module
    rows = module.shape[0]
    return (stack.experts, rows // stack.experts) if isinstance(module, StoredExperts) else (rows,)


def float_linears(model: nn.Module) -> list[str]:
    """The paths of linear layers that are not quantised, as transformers knows them."""
    found: dict[str, None] = {}
    for path, child in model.named_modules():
        if isinstance(child, nn.Linear):
            # A product by a parameter of the module around, as routers have it, goes by the name of that module.
            found[path if type(child) is nn.Linear else path.rpartition(".")[0]] = None
    return list(found)


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors, in several files with an index where they are large."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
