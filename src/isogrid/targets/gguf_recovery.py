"""A GGUF file with the codes that were found in a checkpoint."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from isogrid.errors import CheckpointError
from isogrid.files import write_whole
from isogrid.formats import Quantized
from isogrid.targets.gguf_base import replaced_tensors
from isogrid.targets.gguf_tensors import Found
from isogrid.targets.recovery import checkpoint_tensors


def write_recovered(
    checkpoint: str | Path, weights: Mapping[str, Quantized], base: str | Path, out: str | Path
) -> None:
    """Write a base again, with weights of a checkpoint as they were found, and its other tensors as they are.

    Args:
        checkpoint: file or folder, with the model's config.json.
        weights: by the names of the checkpoint.
        base: a GGUF file in F32, F16 or BF16 of this checkpoint.
        out: file to write.

    Raises:
        ArtifactError, TargetError: see `isogrid.targets.gguf_base.replaced`.
        CheckpointError: there is no configuration.
    """
    contents, _ = replaced_tensors(_found(checkpoint, weights), _config(Path(checkpoint)), base)
    write_whole(Path(out), contents.write)


def _found(checkpoint: str | Path, weights: Mapping[str, Quantized]) -> Iterator[Found]:
    for name, tensor in checkpoint_tensors(checkpoint):
        yield Found("", name, weights.get(name, tensor))


def _config(checkpoint: Path) -> Any:
    """What is asked of a model's configuration."""
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}, which says how many heads there are, cannot be read: {error}.") from error
    data = data.get("text_config", data)
    for old, new in (("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers")):
        data.setdefault(new, data.get(old))
    config = SimpleNamespace(**data)
    config.get_text_config = lambda: config
    return config
