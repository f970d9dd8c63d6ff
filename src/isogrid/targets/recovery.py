"""Checkpoints that were trained on a grid and saved as floats: their lattices, tensor by tensor."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isogrid.errors import CheckpointError, FormatError
from isogrid.formats import Format, Quantized
from isogrid.formats.lattice import find_lattice

INDEX = "model.safetensors.index.json"
CHUNK = 2**24
"""Values that are looked at together."""


@dataclass(frozen=True)
class Recovered:
    """What was found of one tensor of a checkpoint.

    Attributes:
        name: of the tensor.
        blocks: how many it has; 0 where the format does not fit it.
        exact, near: how many lie on a lattice to the last bit of their storage, and within a fifth of a step.
        residual: the largest distance of a block that is near, in steps.
        requantised: blocks that rounding to the nearest, the usual route, would give other codes than the lattice has.
        weight: scales and codes; None where less than half of the blocks are near a lattice.
    """

    name: str
    blocks: int
    exact: int
    near: int
    residual: float
    requantised: int
    weight: Quantized | None


def recover(tensors: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]], fmt: Format) -> Iterator[Recovered]:
    """Find the lattice of every matrix of a checkpoint.

    Args:
        tensors: by name; those of one dimension are left out.
        fmt: one that `isogrid.formats.lattice.find_lattice` takes.

    Raises:
        FormatError: the format is another one.

    >>> from isogrid.formats import named_format
    >>> trained = named_format("q4_0").quantize(torch.randn(4, 64)).dequantize().bfloat16()
    >>> [(found.name, found.blocks, found.exact) for found in recover({"w": trained}, named_format("q4_0"))]
    [('w', 8, 8)]
    """
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if tensor.dim() != 2 or not tensor.dtype.is_floating_point:
            continue
        try:
            fmt.scale_shape(tuple(tensor.shape))
        except FormatError:
            yield Recovered(name, 0, 0, 0, 0.0, 0, None)
            continue
        rows = max(1, CHUNK // tensor.shape[1])
        parts = [find_lattice(chunk, fmt) for chunk in torch.split(tensor, rows)]
        weight = _joined([part.quantized for part in parts], tuple(tensor.shape))
        exact, near, other = (
            torch.cat([getattr(part, kind) for part in parts]) for kind in ("exact", "near", "requantised")
        )
        residual = torch.cat([part.residual for part in parts])
        on_lattice = int(near.sum()) * 2 >= near.numel()
        yield Recovered(
            name,
            near.numel(),
            int(exact.sum()),
            int(near.sum()),
            float(residual[near].max()) if near.any() else 0.0,
            int(other.sum()),
            weight if on_lattice else None,
        )


def checkpoint_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint of safetensors, one after the other.

    Args:
        path: a file, or the folder of a transformers model, whose files may be shards.

    Raises:
        CheckpointError: there is none, a shard is missing, or a file is corrupt or truncated.
    """
    for file in _files(Path(path)):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is missing, corrupt or truncated: {error}.") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / INDEX
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is corrupt: {error}.") from error
        files = [path / name for name in dict.fromkeys(names)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{path} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}.")
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no safetensors file.")
    return files


def _joined(parts: list[Quantized], shape: tuple[int, ...]) -> Quantized:
    """Rows of a tensor, one below the other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    codes = torch.cat([part.codes for part in parts])
    inner = {}
    for name in ("scale", "zero_point", "offset"):
        pieces = [getattr(part, name) for part in parts]
        if pieces[0] is not None:
            inner[name] = _joined(pieces, first.format.scale_shape(shape))
    return Quantized(codes, first.format, shape, **inner)
