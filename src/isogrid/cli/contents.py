"""What files hold, for `isogrid inspect`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from isogrid.cli.operators import onnx_contents, operators_table
from isogrid.cli.pictures import histogram
from isogrid.errors import CheckpointError, IsogridError, MissingExtraError, PlanError, TargetError
from isogrid.formats import IntegerGrid, named_format
from isogrid.layers.attention_states import ATTRIBUTE
from isogrid.planning.plan import Plan, Site
from isogrid.recipes.folders import RunFolder
from isogrid.report import words
from isogrid.targets import Artifact, read_artifact, target_from_name
from isogrid.targets.artifact import sidecar_path
from isogrid.targets.onnx_weights import weight_codes
from isogrid.training.checkpoint import MANIFEST, read_manifest

ONNX_BEGINS = b"\x08"
"""The first field of a serialised ONNX model, its IR version; no other artefact begins so."""


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        facts: lines.
        tables: to be shown below them.
    """

    facts: tuple[str, ...]
    tables: tuple[Table, ...]


def contents_of(path: Path) -> Contents:
    """What a file or folder holds.

    Raises:
        IsogridError: it does not exist, is corrupt, or is neither one of Isogrid's nor an ONNX file.
    """
    if path.is_dir() and sidecar_path(path).is_file():
        return _of_artifact(read_artifact(path))
    if path.is_dir():
        folder = path if (path / MANIFEST).is_file() else RunFolder(path).checkpoint
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{path} holds no checkpoint: there is no {MANIFEST} in it.")
        return _of_checkpoint(folder)
    if not path.is_file():
        raise IsogridError(f"There is no file {path}.")
    if path.suffix == ".json":
        return _of_json(path)
    if path.suffix == ".onnx" and not sidecar_path(path).is_file():
        return Contents(*onnx_contents(path))
    return _of_artifact(read_artifact(path))


def _of_json(path: Path) -> Contents:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"{path} is not JSON: {error}.") from error
    if isinstance(data, dict) and isinstance(data.get("plan"), dict):
        data = data["plan"]
    plan = Plan.from_json(json.dumps(data))
    return Contents((f"{path}: a plan, {plan.scheme} for {plan.target}",), plan.tables())


def _of_checkpoint(folder: Path) -> Contents:
    manifest = read_manifest(folder)
    plan = Plan.from_json(json.dumps(manifest["plan"]))
    try:
        file = folder / manifest["files"]["model"]["file"]
        tensors = load_file(file)
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {folder} is incomplete or corrupt: {error}.") from error
    step = int(tensors["isogrid.step"]) if "isogrid.step" in tensors else 0
    facts = (
        f"{folder}: a checkpoint, {plan.scheme} for {plan.target}",
        f"{words.plural(step, 'step')} of the schedule done, {words.size(file.stat().st_size)} of tensors"
        + (", with the optimizer's state" if "optimizer" in manifest else ""),
    )
    names = {state.site: f"{state.path}.{ATTRIBUTE}.{state.kind}.raw_scale" for state in plan.states}
    scales = {site: tensors[name] for site, name in names.items() if name in tensors}
    weights = _weights_tables(plan, dict(_codes_of_tensors(plan, tensors)))
    return Contents(facts, (*plan.tables(), *_states_tables(plan, scales), *weights))


def _codes_of_tensors(plan: Plan, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for site in plan.sites:
        quantizer = f"{site.name.removesuffix('.weight')}.weight_quantizer"
        if site.kind != "weight" or site.name not in tensors:
            continue
        fmt = named_format(site.format)
        names = {"scale": "raw_scale", "zero_point": "zero_point", "offset": "offset"}
        parts: dict[str, Any] = {part: tensors.get(f"{quantizer}.{name}") for part, name in names.items()}
        yield site.name, fmt.quantize(tensors[site.name], **parts).codes


def _weights_tables(plan: Plan, weights: dict[str, Tensor]) -> list[Table]:
    """Every stored weight with its size and how often each code occurs; no table where there is none.

    Args:
        plan: of the model.
        weights: codes by the name of their site, as whole numbers or ranks in the grid.
    """
    table = Table(title="Stored weights", title_justify="left")
    for column in ("weight", "shape", "format"):
        table.add_column(column, overflow="fold")
    table.add_column("bits/value", justify="right")
    table.add_column("zeros", justify="right")
    table.add_column("codes, from the lowest to the highest")
    for site in plan.sites:
        if site.name in weights:
            codes, fmt = weights[site.name], named_format(site.format)
            zeros = f"{words.percent(float((codes == 0).float().mean()))} %"
            bits = f"{fmt.bits_per_value(site.shape):.3g}"
            table.add_row(site.name, words.shape(site.shape), site.format, bits, zeros, histogram(codes, *_ends(site)))
    return [table] if table.row_count else []


def _ends(site: Site) -> tuple[int, int]:
    grid = named_format(site.format).grid
    return (grid.low, grid.high) if isinstance(grid, IntegerGrid) else (0, len(grid.values()) - 1)


def _of_artifact(artifact: Artifact) -> Contents:
    plan = artifact.plan
    versions = ", ".join(f"{name} {version}" for name, version in artifact.versions.items())
    weights = sum(prod(site.shape) for site in plan.sites if site.kind == "weight")
    facts = (
        f"{artifact.path}: an artefact, {plan.scheme} for {artifact.target}",
        f"{words.size(artifact.size_bytes)} for {words.plural(weights, 'quantised weight')}, "
        f"{8 * artifact.size_bytes / max(weights, 1):.3g} bits each with all that belongs to the file",
        f"written by {versions}",
        "session options: " + (", ".join(f"{k}={v}" for k, v in artifact.session_options.items()) or "none"),
    )
    is_onnx = not artifact.path.is_dir() and _first_byte(artifact.path) == ONNX_BEGINS
    stored = weight_codes(onnx.load(artifact.path)) if is_onnx else {}
    codes = {name: tensor for name, tensor in stored.items() if name in _weights_of(plan)}
    notes: tuple[str, ...] = ()
    scales: dict[str, Tensor] = {}
    try:
        loaded = target_from_name(artifact.target).load(artifact)
        operators = [operators_table(artifact.target, loaded.multiplications(), plan)]
        inside = loaded.stored() if plan.states or not codes else {}
        codes = codes or {name: tensor for name, tensor in inside.items() if name in _weights_of(plan)}
        names = {state.site: f"{state.path}.{ATTRIBUTE}.{state.kind}.scale" for state in plan.states}
        scales = {site: inside[name] for site, name in names.items() if name in inside}
    except (MissingExtraError, TargetError) as error:
        operators, notes = [], (f"what {artifact.target} runs cannot be shown: {error}",)
    tables = (*plan.tables(), *operators, *_states_tables(plan, scales), *_weights_tables(plan, codes))
    return Contents((*facts, *notes), tables)


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


def _states_tables(plan: Plan, scales: dict[str, Tensor]) -> list[Table]:
    """Queries and the key-value cache with their scales; no table where all of it is float.

    Args:
        plan: of the model.
        scales: by site, of those that have one for all tokens.
    """
    table = Table(title="Queries and key-value cache", title_justify="left")
    for column in ("site", "format", "scale"):
        table.add_column(column, overflow="fold")
    for state in plan.states:
        values = scales[state.site].flatten().tolist() if state.site in scales else []
        shown = ", ".join(f"{value:.4g}" for value in values) or f"as they come: {state.rule or 'absmax'}"
        table.add_row(state.site, plan.site(state.site).format, shown)
    return [table] if table.row_count else []


def _weights_of(plan: Plan) -> set[str]:
    return {site.name for site in plan.sites if site.kind == "weight"}
