"""GGUF files of models: of trained ones with their sidecar, and of float ones to hold these against."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from gguf import GGMLQuantizationType as GgmlType
from torch import nn

from isogrid.errors import TargetError
from isogrid.files import write_whole
from isogrid.layers.stored import StoredWeight
from isogrid.planning.plan import Plan
from isogrid.targets.artifact import Artifact, versions_of, write_artifact
from isogrid.targets.gguf_architectures import architecture_of, metadata_of
from isogrid.targets.gguf_base import replaced
from isogrid.targets.gguf_bitnet import BITNET, is_bitnet, norms_of
from isogrid.targets.gguf_rotation import rotation_factors
from isogrid.targets.gguf_tensors import Placed, placed
from isogrid.targets.gguf_tokenizer import tokenizer_metadata
from isogrid.targets.gguf_writing import Contents, float_tensors
from isogrid.targets.llamacpp_cache import cache_options
from isogrid.targets.llamacpp_model import LAYERS_KEY


def write_gguf(model: nn.Module, plan: Plan, path: Path, tokenizer: Any, base: str | Path | None) -> Artifact:
    """Write the file of a converted model with its sidecar; see `LlamaCpp.export`."""
    if getattr(model, "config", None) is None:
        raise TargetError("GGUF files are written of transformers' language models, and this has no config.")
    if base is None:
        contents, tensors = direct(model, tokenizer)
    else:
        contents, tensors = replaced(model, base)
    contents.metadata |= {LAYERS_KEY: json.dumps(_layers(model, tensors)), "isogrid.scheme": plan.scheme}
    versions = versions_of("isogrid", "torch", "gguf")
    artifact = Artifact(path, plan.target, cache_options(plan), plan, versions, sha256="")
    return write_artifact(artifact, contents.write)


def write_float_gguf(
    model: nn.Module, path: str | Path, tokenizer: Any = None, type: Literal["F32", "F16", "BF16"] = "BF16"
) -> Path:
    """Write a float model of transformers, as llama.cpp's converter does: vectors in float32, matrices in a type.

    Args:
        model: float, not prepared, of a family that is written directly.
        path: of the file.
        tokenizer: of transformers, or None.
        type: of matrices.

    Raises:
        TargetError: llama.cpp does not know the model or the tokenizer.
    """
    contents, _ = direct(model, tokenizer)
    kind, dtype = GgmlType[type], {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type]
    for name, (data, _) in contents.tensors.items():
        if data.ndim > 1:
            values = torch.from_numpy(data).to(dtype).contiguous()
            contents.tensors[name] = values.view(torch.uint8).numpy(), kind
    write_whole(Path(path), contents.write)
    return Path(path)


def direct(model: nn.Module, tokenizer: Any) -> tuple[Contents, list[Placed]]:
    """What the file of a model holds, of a family that is written directly, and its tensors."""
    config: Any = model.config
    bitnet = is_bitnet(model)
    architecture = BITNET if bitnet else architecture_of(config)
    contents = Contents(architecture.name)
    contents.metadata = {
        "general.name": str(getattr(config, "name_or_path", "") or config.model_type),
        **metadata_of(config, architecture),
        **tokenizer_metadata(tokenizer, config.vocab_size),
    }
    tensors = placed(model, architecture)
    contents.tensors = float_tensors(rotation_factors(config) | (norms_of(config) if bitnet else {}))
    contents.place(tensors)
    return contents, tensors


def _layers(model: nn.Module, tensors: Sequence[Placed]) -> dict[str, Any]:
    """For each of the file's tensors that is a quantised layer's weight: the layers' paths, and the order of rows."""
    found = {}
    for tensor in tensors:
        paths = [source.path for source in tensor.sources if isinstance(model.get_submodule(source.path), StoredWeight)]
        if paths and tensor.name.endswith(".weight"):
            found[tensor.name] = {"paths": paths, "order": asdict(tensor.order)}
    return found
