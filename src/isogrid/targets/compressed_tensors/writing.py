"""A converted model as a folder that vLLM and transformers load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import TargetError
from isogrid.layers.experts import StoredExperts
from isogrid.layers.stored import StoredLinear
from isogrid.planning.plan import Plan
from isogrid.planning.state import STEP_NAME
from isogrid.targets.artifact import Artifact, write_folder
from isogrid.targets.compressed_tensors.config import Storage, quantization_config
from isogrid.targets.compressed_tensors.packing import LAYOUTS, PACKED
from isogrid.targets.compressed_tensors.rows import Rows, converted, take_rows

SHARD = "5GB"
"""The most that one file of tensors holds, as transformers has it."""


def write_checkpoint(integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
    """Write config.json, safetensors and the sidecar; the folder appears whole or not at all.

    Raises:
        TargetError: the model is none of transformers, or nothing in it is quantised for this target.
        ArtifactError: the folder cannot be written.
    """
    model: Any = integer_model
    if not hasattr(integer_model, "config") or not hasattr(integer_model, "save_pretrained"):
        raise TargetError(
            f"A checkpoint for vLLM is one of a model of transformers, with its config; this is a "
            f"{type(integer_model).__name__}. Use another target, such as onnxruntime."
        )
    stored = {name: module for name, module in integer_model.named_modules() if isinstance(module, StoredLinear)}
    if not stored:
        raise TargetError("Nothing in this model is quantised, so there is nothing to write for vLLM.")
    tensors, rows = checkpoint_tensors(integer_model, stored)
    config = {**model.config.to_dict(), "architectures": [type(integer_model).__name__]}
    config["quantization_config"] = _quantization(integer_model, stored, rows)

    def write(folder: Path) -> None:
        for name in ("generation_config", "tokenizer"):
            part: Any = getattr(model, name, None)
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(str(folder))
        _write_tensors(folder, tensors)
        # Through the config's own JSON: it writes dtypes and nested configs as transformers reads them.
        own = json.loads(model.config.to_json_string(use_diff=False))
        text = json.dumps({**own, **{key: config[key] for key in ("architectures", "quantization_config")}}, indent=2)
        (folder / "config.json").write_text(text, encoding="utf-8")

    versions = {"torch": torch.__version__, "transformers": _version("transformers")}
    return write_folder(Artifact(Path(path), plan.target, {}, plan, versions, ""), write)


def checkpoint_tensors(model: nn.Module, stored: Mapping[str, StoredLinear]) -> tuple[dict[str, Tensor], Rows]:
    """All tensors of a checkpoint by their names on disk, and which rows of which weight lie where."""
    inside = tuple(f"{path}." for path in stored)
    plain: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if name == STEP_NAME or (name.startswith(inside) and not name.endswith(".bias")) or key in seen:
            continue  # tied tensors are stored once
        seen.add(key)
        plain[name] = tensor
    weights = {weight_name(path, module): _row_shape(module) for path, module in stored.items()}
    sources = {weight_name(path, module): module for path, module in stored.items()}
    on_disk = converted(model, plain, weights)
    tensors = dict(on_disk.plain)
    float_model: Any = model
    dtype: torch.dtype = float_model.dtype
    for prefix, (source, rows) in on_disk.rows.items():
        module = sources[source]
        for name, tensor in packed_tensors(module, rows, dtype).items():
            tensors[f"{prefix}.{name}"] = tensor
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, on_disk.rows


def packed_tensors(module: StoredLinear, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of some rows of a layer, by their names within it, for a model of this dtype."""
    quantized = take_rows(module.quantized, rows)
    layout = LAYOUTS[storage_of(module).layout]
    tensors = layout.pack(quantized)
    if layout is PACKED:
        # Readers decompress in the dtype that the scale has in the file, so it is the model's, in which it is exact.
        scale = tensors["weight_scale"].to(dtype)
        if not torch.equal(scale.float(), tensors["weight_scale"].float()):
            raise TargetError(
                f"Scales of {module.format} cannot be stored in {dtype}, the dtype of the model. "
                "Train on scales of that dtype, by a rule such as weight='int4/group128:scale=float16'."
            )
        tensors["weight_scale"] = scale
    if module.input is not None:
        tensors["input_scale"] = module.input.scale.reshape(1)
    return tensors


def storage_of(module: StoredLinear) -> Storage:
    """How a layer is stored."""
    return Storage(module.format, module.activations)


def weight_name(path: str, module: nn.Module) -> str:
    """The name of a layer's weight in transformers' own state_dict."""
    stack: Any = module
    return f"{path.rpartition('.')[0]}.{stack.source}" if isinstance(module, StoredExperts) else f"{path}.weight"


def _row_shape(module: StoredLinear) -> tuple[int, ...]:
    stack: Any = module
    rows = module.shape[0]
    return (stack.experts, rows // stack.experts) if isinstance(module, StoredExperts) else (rows,)


def _quantization(model: nn.Module, stored: Mapping[str, StoredLinear], rows: Rows) -> dict[str, Any]:
    disk: dict[str, list[str]] = {}
    for name, (source, _) in rows.items():
        disk.setdefault(source, []).append(name)
    layers: dict[str, Storage] = {}
    experts: dict[str, Storage] = {}
    for path, module in stored.items():
        if isinstance(module, StoredExperts):
            experts[path] = storage_of(module)
        else:
            for name in dict.fromkeys((path, *disk[f"{path}.weight"])):
                layers[name] = storage_of(module)
    ignore: dict[str, None] = {}
    for path, child in model.named_modules():
        if isinstance(child, nn.Linear):
            # A product by a parameter of the module around, as routers have it, goes by the name of that module.
            ignore[path if type(child) is nn.Linear else path.rpartition(".")[0]] = None
    return quantization_config(layers, experts, list(ignore))  # type: ignore[no-any-return]


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
