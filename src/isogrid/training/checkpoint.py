"""Checkpoints: tensors in safetensors, the rest in JSON, committed by one rename.

A checkpoint folder holds a manifest, `checkpoint.json`, and the tensor files it names, with their digests. New tensor
files get new names and the manifest is replaced last, so a crash or a full disk leaves the previous checkpoint whole.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from isogrid.errors import CheckpointError, PlanError
from isogrid.files import digest, write_json, write_whole
from isogrid.planning.plan import Plan
from isogrid.planning.prepare import prepare
from isogrid.planning.state import prepared_state

MANIFEST = "checkpoint.json"
FORMAT = 1
"""Version of the layout; a reader refuses a newer one."""


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a prepared model: all parameters and buffers, the plan and the schedule's position.

    Args:
        model: prepared.
        folder: made if missing; a checkpoint in it is replaced in one step.

    Raises:
        CheckpointError: the folder cannot be written; the previous checkpoint stays whole.
    """
    _commit(Path(folder), model, {"model": dict(model.state_dict())}, {})


def restore(float_model: nn.Module, folder: str | Path) -> nn.Module:
    """Prepare a float model by a checkpoint's plan and load everything into it; in place, and returned.

    Raises:
        CheckpointError: there is no checkpoint, or it is corrupt, or of another model.
    """
    manifest = read_manifest(Path(folder))
    tensors = _read_tensors(Path(folder), manifest, "model")
    try:
        prepare(float_model, Plan.from_json(json.dumps(manifest["plan"])))
    except PlanError as error:
        raise CheckpointError(f"The checkpoint {folder} is of another model: {error}") from error
    load_state(float_model, tensors, folder)
    return float_model


def save_training(folder: str | Path, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any]) -> None:
    """Write all that a run needs to go on with bit-identical losses: model, optimizer, random state, `extra`.

    Args:
        folder: as for `save`; `restore` reads it too.
        model: prepared.
        optimizer: of torch.
        extra: JSON data of the caller's: epoch, position in the data, learning-rate schedule.
    """
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                plain[f"{index}.{name}"] = value
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    files = {"model": dict(model.state_dict()), "optimizer": tensors, "random": random}
    _commit(
        Path(folder), model, files, {"optimizer": {"plain": plain, "groups": state["param_groups"]}, "extra": extra}
    )


def load_training(folder: str | Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load what `save_training` wrote into a prepared model and its optimizer; returns `extra`.

    Raises:
        CheckpointError: nothing to resume from, corrupt, or of another model or optimizer.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if "optimizer" not in manifest:
        raise CheckpointError(f"{folder} holds a model but no run to resume. It was written by isogrid.save.")
    load_state(model, _read_tensors(folder, manifest, "model"), folder)
    state: dict[int, dict[str, Any]] = {}
    entries = {**_read_tensors(folder, manifest, "optimizer"), **manifest["optimizer"]["plain"]}
    for key, value in entries.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    try:
        optimizer.load_state_dict({"state": state, "param_groups": manifest["optimizer"]["groups"]})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"The optimizer in {folder} does not fit this one: {error}") from error
    random = _read_tensors(folder, manifest, "random")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    extra: dict[str, Any] = manifest["extra"]
    return extra


def load_state(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Load a state_dict strictly; raises CheckpointError, naming what differs, where it does not fit."""
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit this model: {error}") from error
    if missing or unexpected:
        raise CheckpointError(
            f"{source} does not fit this model. Missing: {', '.join(missing) or 'nothing'}. "
            f"Unknown: {', '.join(unexpected) or 'nothing'}."
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; raises CheckpointError where there is none that can be read."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is corrupt: {error}.") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}; this version of Isogrid reads up to {FORMAT}. Upgrade Isogrid."
        )
    return manifest


def _commit(folder: Path, model: nn.Module, files: dict[str, dict[str, Tensor]], rest: dict[str, Any]) -> None:
    plan = json.loads(prepared_state(model).plan.to_json())
    previous = set(folder.glob("*.safetensors")) if folder.is_dir() else set()
    entries, written = {}, set()
    for name, tensors in files.items():
        unique, aliases = _without_aliases(tensors)
        draft = folder / f"{name}.new"
        write_whole(draft, lambda path, unique=unique: save_file(unique, path))  # type: ignore[misc]
        content = digest(draft)
        path = folder / f"{name}-{content[:16]}.safetensors"
        draft.replace(path)
        written.add(path)
        entries[name] = {"file": path.name, "sha256": content, "aliases": aliases}
    write_json(folder / MANIFEST, {"format": FORMAT, "plan": plan, "files": entries, **rest})
    for path in previous - written:
        path.unlink(missing_ok=True)


def _without_aliases(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and which names stand for which others: tied weights are one tensor."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            unique[name] = tensor.detach().cpu().contiguous().clone()
    return unique, aliases


def _read_tensors(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, Tensor]:
    try:
        entry = manifest["files"][name]
        path = folder / entry["file"]
        if digest(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is corrupt or truncated: its digest is not the one in {MANIFEST}.")
        tensors = load_file(path)
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {folder} is incomplete: {error}.") from error
    return {**tensors, **{alias: tensors[target] for alias, target in entry["aliases"].items()}}
