"""Checkpoints: tensors in safetensors, the rest in JSON, committed by one rename.

A checkpoint folder holds a manifest, `checkpoint.json`, and the tensor files it names, with their digests. New tensor
files get new names and the manifest is replaced last, so a crash or a full disk leaves the previous checkpoint whole.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from isogrid.errors import CheckpointError, PlanError
from isogrid.files import digest, rename, write_json, write_whole
from isogrid.layers.adapters import AdapterSpec
from isogrid.planning.plan import Plan
from isogrid.planning.prepare import prepare
from isogrid.planning.state import prepared_state
from isogrid.training.adapters import attach, set_specs, use_adapters
from isogrid.training.codes import code_layers, coded_layers
from isogrid.training.optimizer_state import load_optimizer, optimizer_parts

MANIFEST = "checkpoint.json"
FORMAT = 1
"""Version of the layout; a reader refuses a newer one."""


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a prepared model: all parameters and buffers, the plan, adapters, what trains, the schedule's position.

    Args:
        model: prepared.
        folder: made if missing; a checkpoint in it is replaced in one step.

    Raises:
        PlanError: the model is not prepared.
        CheckpointError: the folder cannot be written; the previous checkpoint stays whole.

    >>> import isogrid as ig, tempfile
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> plan = ig.plan(model, scheme="w8a8", example_inputs=(torch.zeros(1, 4),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(ig.prepare(model, plan), folder)
    ...     again = restore(nn.Sequential(nn.Linear(4, 2)), folder)
    >>> bool((again[0].weight == model[0].weight).all())
    True
    """
    _commit(Path(folder), model, {"model": dict(model.state_dict())}, {})


def restore(float_model: nn.Module, folder: str | Path) -> nn.Module:
    """Prepare a float model by a checkpoint's plan and load everything into it; in place, and returned.

    Raises:
        CheckpointError: there is no checkpoint, or it is corrupt, or of another model, which is then as it was.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    tensors = _read_tensors(folder, manifest, "model")
    try:
        plan = Plan.from_json(json.dumps(manifest["plan"]))
    except PlanError as error:
        raise CheckpointError(f"{folder / MANIFEST} is corrupt: {error}") from error
    in_codes: list[str] = manifest.get("coded", [])
    _check_fits(float_model, tensors, {f"{path}.weight" for path in in_codes}, folder)
    try:
        prepare(float_model, plan)
        code_layers(float_model, in_codes)
        _train_the_same(float_model, manifest)
    except PlanError as error:
        raise CheckpointError(f"The checkpoint {folder} is of another model: {error}") from error
    load_state(float_model, tensors, folder)
    return float_model


def _train_the_same(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Add the adapters that a saved model had, and freeze what was frozen."""
    specs = [AdapterSpec.from_json(entry) for entry in manifest.get("adapters", [])]
    for spec in specs:
        attach(model, spec)
    set_specs(model, prepared_state(model).adapters, tuple(manifest.get("requantized", ())))
    if specs:
        use_adapters(model, *[spec.name for spec in specs if spec.active])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in manifest.get("frozen", ()) and parameter.requires_grad)


def _check_fits(float_model: nn.Module, tensors: dict[str, Tensor], in_codes: set[str], source: Path) -> None:
    """Refuse a checkpoint of another model before anything is changed; weights in codes have other shapes."""
    for name, tensor in float_model.state_dict().items():
        if name not in tensors:
            raise CheckpointError(f"{source} is of another model: it has no {name}.")
        if tensors[name].shape != tensor.shape and name not in in_codes:
            raise CheckpointError(
                f"{source} is of another model: its {name} has shape {list(tensors[name].shape)}, "
                f"not {list(tensor.shape)}."
            )


def save_training(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    extra: dict[str, Any],
    companion: nn.Module | None = None,
) -> None:
    """Write all that a run needs to go on with bit-identical losses: model, optimizer, random state, `extra`.

    The random state is that of torch, Python and numpy; a generator of your own goes into `extra`.

    Args:
        folder: as for `save`; `restore` reads it too.
        model: prepared.
        optimizer: of torch.
        extra: JSON data of the caller's: epoch, position in the data, learning-rate schedule.
        companion: another model that the optimizer trains, such as a teacher that learns along.
    """
    tensors, plain = optimizer_parts(optimizer)
    generators, others = random_state()
    files = {"model": dict(model.state_dict()), "optimizer": tensors, "random": generators}
    if companion is not None:
        files["companion"] = dict(companion.state_dict())
    _commit(Path(folder), model, files, {"optimizer": plain, "generators": others, "extra": extra})


def load_training(
    folder: str | Path, model: nn.Module, optimizer: Optimizer, companion: nn.Module | None = None
) -> dict[str, Any]:
    """Load what `save_training` wrote into a prepared model and its optimizer; returns `extra`.

    The model is one of `restore`, or prepared by the same plan; a Schedule made before continues where it was too.

    Raises:
        CheckpointError: nothing to resume from, corrupt, or of another model or optimizer.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if "optimizer" not in manifest:
        raise CheckpointError(f"{folder} holds a model but no run to resume. It was written by isogrid.save.")
    tensors = _read_tensors(folder, manifest, "model")
    optimizer_tensors, generators = (_read_tensors(folder, manifest, name) for name in ("optimizer", "random"))
    others = None if companion is None else _read_tensors(folder, manifest, "companion")
    load_optimizer(optimizer, optimizer_tensors, manifest["optimizer"], folder)
    load_state(model, tensors, folder)
    if companion is not None and others is not None:
        load_state(companion, others, folder)
    set_random_state(generators, manifest["generators"])
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
        version = int(manifest["format"])
        if version <= FORMAT:
            manifest["plan"], manifest["files"]["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is corrupt: {type(error).__name__}: {error}.") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}; this version of Isogrid reads up to {FORMAT}. Upgrade Isogrid."
        )
    return manifest


def _commit(folder: Path, model: nn.Module, files: dict[str, dict[str, Tensor]], rest: dict[str, Any]) -> None:
    state = prepared_state(model)
    described = {
        "plan": json.loads(state.plan.to_json()),
        "coded": coded_layers(model),
        "adapters": [spec.to_json() for spec in state.adapters],
        "requantized": list(state.requantized),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }
    # A run that was killed while it wrote may have left drafts.
    previous = {*folder.glob("*.safetensors"), *folder.glob(".*.new.*")} if folder.is_dir() else set()
    entries: dict[str, Any] = {}
    written: set[Path] = set()
    try:
        for name, tensors in files.items():
            path, entries[name] = _write_tensors(folder, name, tensors)
            written.add(path)
        write_json(folder / MANIFEST, {"format": FORMAT, **described, "files": entries, **rest})
    except BaseException:
        _delete(written - previous)
        raise
    _delete(previous - written)


def _write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> tuple[Path, dict[str, Any]]:
    """Write tensors to a file that is named after what is in it; its path and its entry in the manifest."""
    unique, aliases = _without_aliases(tensors)
    draft = folder / f"{name}.new"
    write_whole(draft, lambda path: save_file(unique, path))
    content = digest(draft)
    path = folder / f"{name}-{content[:16]}.safetensors"
    rename(draft, path)
    return path, {"file": path.name, "sha256": content, "aliases": aliases}


def _delete(paths: set[Path]) -> None:
    for path in paths:
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
        return {**tensors, **{alias: tensors[target] for alias, target in entry["aliases"].items()}}
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {folder} is incomplete: {type(error).__name__}: {error}.") from error


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of all global random generators: torch's as tensors, Python's and numpy's as JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state(legacy=True)
    return tensors, {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}


def set_random_state(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Set the global random generators to what `random_state` gave."""
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
