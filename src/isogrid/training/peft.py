"""Adapters as the library PEFT keeps them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

The files are read and written as they are; the library itself is not needed.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isogrid.errors import CheckpointError, PlanError
from isogrid.files import write_json, write_whole
from isogrid.layers.adapters import Adapter, AdapterSpec, Method, adapter_of
from isogrid.layers.borrowed import TurnedLinear
from isogrid.layers.weights import base_of
from isogrid.planning.rules import nearest
from isogrid.planning.state import prepared_state
from isogrid.training.adapters import AdapterReport, adaptable, add_adapters

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
UNKNOWN: dict[str, Any] = {
    "rank_pattern": "ranks that differ from layer to layer",
    "alpha_pattern": "weights that differ from layer to layer",
    "modules_to_save": "modules that are trained as a whole",
    "layer_replication": "layers that are repeated",
    "target_parameters": "parameters that belong to no layer",
    "lora_bias": "biases of updates",
    "alora_invocation_tokens": "updates that depend on the tokens",
    "use_qalora": "inputs that are pooled by PEFT's own rule",
}
"""What a configuration of PEFT may ask for and adapters here do not have."""


class Pair(NamedTuple):
    """An update as adapters here have it: A [rank, rest], B [out, rank], magnitude [out] or None."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


def load_peft(
    model: nn.Module, source: str | Path | nn.Module, name: str = "default", method: Method = "l4q"
) -> AdapterReport:
    """Give a prepared model a LoRA or DoRA adapter of PEFT: its matrices, from which training goes on.

    Args:
        model: prepared; made from the base of the adapter.
        source: a folder that PEFT's `save_pretrained` wrote, or a PeftModel, whose adapter of this name is taken.
        name: of the adapter here.
        method: as for `add_adapters`.

    Raises:
        CheckpointError: there are no such files, or they cannot be read.
        PlanError: the adapter is for another model, or has what adapters here have not.
    """
    if isinstance(source, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            peft: Any = source
            peft.save_pretrained(folder, selected_adapters=[name])
            return load_peft(model, Path(folder) / ("" if name == "default" else name), name, method)
    config, tensors = _read(Path(source))
    _check_config(config, source)
    pairs = _pairs(model, tensors, source)
    report = add_adapters(
        model, config["r"], config["lora_alpha"], list(pairs), method=method, name=name,
        dora=bool(config.get("use_dora")), rank_stabilized=bool(config.get("use_rslora")),
    )  # fmt: skip
    layers = adaptable(model)
    for path, pair in pairs.items():
        adapter = adapter_of(layers[path], name)
        adapter.A.data.copy_(pair.a)
        adapter.B.data.copy_(pair.b)
        if pair.magnitude is not None and adapter.magnitude is not None:
            adapter.magnitude.data.copy_(pair.magnitude)
    return report


def save_peft(model: nn.Module, folder: str | Path, name: str = "default", base: str | None = None) -> None:
    """Write an adapter as PEFT does, so that `PeftModel.from_pretrained(base_model, folder)` reads it.

    What PEFT then computes is `W x + s·BAx` with a float W: the adapter without the grid that it was trained in.

    Args:
        model: prepared, with adapters.
        folder: made if missing.
        name: of the adapter.
        base: name or folder of the base model, which PEFT asks for where it has to load it itself.

    Raises:
        PlanError: there is no such adapter, or it stands where PEFT has none.
    """
    spec = next((spec for spec in prepared_state(model).adapters if spec.name == name), None)
    if spec is None or spec.method == "qa-lora":
        raise PlanError(f"There is no adapter {name!r} that PEFT could read.")
    layers = adaptable(model)
    tensors: dict[str, Tensor] = {}
    for path in spec.layers:
        tensors |= _tensors_of(model, path, layers[path], adapter_of(layers[path], name))
    folder = Path(folder)
    write_whole(folder / TENSORS, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    write_json(folder / CONFIG, _config(model, spec, base))


def _config(model: nn.Module, spec: AdapterSpec, base: str | None) -> dict[str, Any]:
    outer = [_outer(model, path) for path in spec.layers]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(model.get_submodule(path), TurnedLinear) for path in outer),
        "target_modules": outer,
        "use_dora": spec.dora,
        "use_rslora": spec.rank_stabilized,
    }


def _outer(model: nn.Module, path: str) -> str:
    """The path that a layer has outside: GPT-2's Conv1D has its product inside."""
    parent = path.rpartition(".")[0]
    return parent if parent and isinstance(model.get_submodule(parent), TurnedLinear) else path


def _tensors_of(model: nn.Module, path: str, layer: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    a, b = adapter.A.detach().cpu(), adapter.B.detach().cpu()
    key = f"{PREFIX}{_outer(model, path)}"
    if isinstance(layer, nn.Embedding):
        found = {f"{key}.lora_embedding_A": b.T, f"{key}.lora_embedding_B": a.T}
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
        spatial = [1] * len(layer.kernel_size)
        found = {
            f"{key}.lora_A.weight": a.reshape(len(a), layer.in_channels, *layer.kernel_size),
            f"{key}.lora_B.weight": b.reshape(*b.shape, *spatial),
        }
    elif isinstance(layer, nn.Linear) and (not hasattr(layer, "borrowed_key") or _outer(model, path) != path):
        found = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    else:
        raise PlanError(f"PEFT has no adapter for {path!r}, which is a {type(layer).__name__}.")
    if adapter.magnitude is not None:
        found[f"{key}.lora_magnitude_vector"] = adapter.magnitude.detach().cpu()
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return config, load_file(folder / TENSORS)
    except FileNotFoundError as error:
        missing = Path(error.filename or TENSORS).name
        raise CheckpointError(f"{folder} is no adapter of PEFT: it has no {missing}.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The adapter in {folder} cannot be read: {error}") from error


def _check_config(config: dict[str, Any], source: Any) -> None:
    if config.get("peft_type") != "LORA":
        raise PlanError(f"{source} is a {config.get('peft_type')} of PEFT. Isogrid reads LORA, DoRA and rsLoRA.")
    reason = next((words for key, words in UNKNOWN.items() if config.get(key)), None)
    if config.get("bias", "none") != "none":
        reason = "biases that are trained"
    if reason is not None:
        raise PlanError(f"The adapter {source} has {reason}, which Isogrid's have not. Merge it with PEFT first.")


def _pairs(model: nn.Module, tensors: dict[str, Tensor], source: Any) -> dict[str, Pair]:
    """The updates by the paths of layers here."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, part = key.removeprefix(PREFIX).partition(".lora_")
        parts.setdefault(module, {})[part.removesuffix(".weight")] = tensor
    layers = adaptable(model)
    inner = {_outer(model, path): path for path in layers}
    found: dict[str, Pair] = {}
    for module, own in parts.items():
        path = inner.get(module)
        if path is None:
            raise PlanError(
                f"The adapter {source} is for another model, or for a layer that stays float: there is no quantised "
                f"layer {module!r}.{nearest(module, inner)}"
            )
        found[path] = _pair(path, layers[path], own, source)
    if not found:
        raise PlanError(f"The adapter {source} is empty.")
    return found


def _pair(path: str, layer: nn.Module, own: dict[str, Tensor], source: Any) -> Pair:
    table = "embedding_A" in own
    a, b = (own.get("embedding_B"), own.get("embedding_A")) if table else (own.get("A"), own.get("B"))
    if a is None or b is None:
        raise PlanError(f"The adapter {source} lacks a matrix of {path!r}.")
    a, b = (a.T, b.T) if table else (a.flatten(1), b.flatten(1))
    shape = base_of(layer).flatten(1).shape
    if (len(b), a.shape[1]) != tuple(shape):
        raise PlanError(
            f"The adapter {source} is for another model: it changes a weight of {len(b)} by {a.shape[1]}, and that of "
            f"{path!r} is {shape[0]} by {shape[1]}."
        )
    magnitude = own.get("magnitude_vector")
    return Pair(a, b, None if magnitude is None else magnitude.flatten())
