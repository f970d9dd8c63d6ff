"""What files hold, for `isogrid inspect`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from isogrid.errors import CheckpointError, IsogridError, PlanError
from isogrid.formats import IntegerGrid, named_format
from isogrid.planning.plan import Plan, Site
from isogrid.recipes.folders import RunFolder
from isogrid.report import words
from isogrid.targets import Artifact, read_artifact
from isogrid.training.checkpoint import MANIFEST, read_manifest

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 32


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        facts: lines.
        plan: of the model.
        weights: codes by the name of their site, as whole numbers or ranks in the grid.
    """

    facts: tuple[str, ...]
    plan: Plan
    weights: dict[str, Tensor]

    def weights_table(self) -> Table:
        """Every stored weight with its size and how often each code occurs."""
        table = Table(title="Stored weights", title_justify="left")
        for column in ("weight", "shape", "format"):
            table.add_column(column, overflow="fold")
        table.add_column("bits/value", justify="right")
        table.add_column("zeros", justify="right")
        table.add_column("codes, from the lowest to the highest")
        for site in self.plan.sites:
            if site.name in self.weights:
                codes, fmt = self.weights[site.name], named_format(site.format)
                zeros = f"{words.percent(float((codes == 0).float().mean()))} %"
                bits = f"{fmt.bits_per_value(site.shape):.3g}"
                picture = histogram(codes, *_ends(site))
                table.add_row(site.name, words.shape(site.shape), site.format, bits, zeros, picture)
        return table


def contents_of(path: Path) -> Contents:
    """What a file or folder holds.

    Raises:
        IsogridError: it does not exist, is corrupt, or is none of Isogrid's.
    """
    if path.is_dir():
        folder = path if (path / MANIFEST).is_file() else RunFolder(path).checkpoint
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{path} holds no checkpoint: there is no {MANIFEST} in it.")
        return _of_checkpoint(folder)
    if not path.is_file():
        raise IsogridError(f"There is no file {path}.")
    if path.suffix == ".json":
        return _of_json(path)
    return _of_artifact(read_artifact(path))


def histogram(codes: Tensor, low: int, high: int) -> str:
    """How often each code from low to high occurs, as a line of bars; neighbours share a bar where there are many.

    >>> histogram(torch.tensor([-1, 0, 0, 0, 0, 1, 1]), -1, 1)
    '▂█▄'
    """
    values = codes.detach().flatten().float().numpy()
    counts, _ = np.histogram(values, bins=min(high - low + 1, WIDTH), range=(low - 0.5, high + 0.5))
    tallest = max(int(counts.max()), 1)
    # A code that occurs at all shows: rounded up.
    return "".join(BARS[-(-int(count) * (len(BARS) - 1) // tallest)] for count in counts)


def _ends(site: Site) -> tuple[int, int]:
    grid = named_format(site.format).grid
    return (grid.low, grid.high) if isinstance(grid, IntegerGrid) else (0, len(grid.values()) - 1)


def _of_json(path: Path) -> Contents:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"{path} is not JSON: {error}.") from error
    if isinstance(data, dict) and isinstance(data.get("plan"), dict):
        data = data["plan"]
    plan = Plan.from_json(json.dumps(data))
    return Contents((f"{path}: a plan, {plan.scheme} for {plan.target}",), plan, {})


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
    return Contents(facts, plan, dict(_codes_of_tensors(plan, tensors)))


def _codes_of_tensors(plan: Plan, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for site in plan.sites:
        quantizer = f"{site.name.removesuffix('.weight')}.weight_quantizer"
        if site.kind != "weight" or site.name not in tensors:
            continue
        fmt = named_format(site.format)
        names = {"scale": "raw_scale", "zero_point": "zero_point", "offset": "offset"}
        parts: dict[str, Any] = {part: tensors.get(f"{quantizer}.{name}") for part, name in names.items()}
        yield site.name, fmt.quantize(tensors[site.name], **parts).codes


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
    return Contents(facts, plan, dict(_codes_of_file(plan, onnx.load(artifact.path))))


def _codes_of_file(plan: Plan, model: onnx.ModelProto) -> Iterator[tuple[str, Tensor]]:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    packed = {node.input[1]: node for node in model.graph.node if node.op_type == "MatMulNBits"}
    for site in plan.sites:
        if site.name not in stored or site.kind != "weight":
            continue
        array = numpy_helper.to_array(stored[site.name])
        if site.name in packed:
            bits = next(a.i for a in packed[site.name].attribute if a.name == "bits")
            array = _unpacked(array, bits)
        yield site.name, torch.from_numpy(array.astype(np.float32))


def _unpacked(array: Any, bits: int) -> Any:
    """Codes around zero from bytes that hold several, the lowest bits first, each plus half of the range."""
    parts = [(array >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).astype(np.int16) - 2 ** (bits - 1)
