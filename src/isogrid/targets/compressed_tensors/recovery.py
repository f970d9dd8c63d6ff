"""A compressed-tensors checkpoint with the codes that were found in one of floats."""

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import CheckpointError, MissingExtraError, TargetError
from isogrid.formats import Quantized
from isogrid.targets.checkpoints.rows import converted
from isogrid.targets.checkpoints.writing import write_tensors
from isogrid.targets.compressed_tensors.config import Storage, quantization_config
from isogrid.targets.compressed_tensors.writing import stored_tensors
from isogrid.targets.recovery import checkpoint_tensors


def linear_layers(checkpoint: str | Path) -> dict[str, str]:
    """The linear layers of a checkpoint's model: their names in the files, and the paths of their modules.

    Raises:
        CheckpointError: there is no config.json of a model that transformers knows.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "To know which tensors are linear layers' takes transformers. Install it with: pip install 'isogrid[vllm]'"
        ) from error
    library: Any = transformers
    try:
        config = library.AutoConfig.from_pretrained(_folder(checkpoint))
        with torch.device("meta"):
            model = getattr(library, config.architectures[0])(config)
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{checkpoint} has no config.json of a model of transformers: {error}") from error
    linear = {
        f"{path}.weight": tuple(module.weight.shape[:1])
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    rows = converted(model, {}, linear).rows
    return {name: source.removesuffix(".weight") for name, (source, _) in rows.items()}


def write_recovered(checkpoint: str | Path, weights: Mapping[str, Quantized], out: str | Path) -> list[str]:
    """Write a checkpoint again, with the weights of its linear layers as they were found; all else stays as it is.

    Args:
        checkpoint: file or folder, with the model's config.json.
        weights: by the names of the checkpoint, in one format of integers.
        out: folder to write; it appears whole or not at all.

    Returns:
        The names of weights that were found and are no linear layers', which stay float.

    Raises:
        CheckpointError: there is no configuration of a model that transformers knows, or `out` is there already.
        TargetError: no linear layer lies on a lattice, or the dtype of the checkpoint cannot hold the scales.
    """
    layers = linear_layers(checkpoint)
    found = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    packed = {name: found[name] for name in layers if name in found}
    if not packed:
        raise TargetError(f"No linear layer of {checkpoint} lies on a lattice of this format: nothing to write.")
    target, source = Path(out), _folder(checkpoint)
    if target.exists():
        raise CheckpointError(f"{target} is there already. Name another folder, or remove it.")
    fmt = next(iter(packed.values())).format
    storage = {name: Storage(fmt, "float") for layer in packed for name in (layers[layer], layer)}
    ignore = [path for name, path in layers.items() if name not in packed]
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(storage, {}, ignore)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.new")
    try:
        temporary.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json", ".gguf", ".bin")):
                shutil.copy2(file, temporary / file.name)  # the tokenizer, generation_config.json
        (temporary / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        write_tensors(temporary, dict(_tensors(checkpoint, packed)))
        temporary.replace(target)
    except OSError as error:
        raise CheckpointError(f"Cannot write {target}: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(name for name in found if name not in packed)


def _tensors(checkpoint: str | Path, packed: Mapping[str, Quantized]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in checkpoint_tensors(checkpoint):
        layer = name.removesuffix(".weight")
        if layer not in packed or not name.endswith(".weight"):
            yield name, tensor
        else:
            for leaf, part in stored_tensors(packed[layer], "float", tensor.dtype).items():
                yield f"{layer}.{leaf}", part


def _folder(checkpoint: str | Path) -> Path:
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent
