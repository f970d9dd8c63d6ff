"""Trained weights in the place of those in a GGUF file that llama.cpp's own converter made.

This is the way for every architecture that is not written directly: metadata, tokenizer and the names of tensors are
the converter's. How it rearranged a tensor is seen by comparing: of the ways it has, the one is taken that brings the
model's tensor next to the base's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from torch import Tensor, nn

from isogrid.errors import ArtifactError, TargetError
from isogrid.targets.gguf_experts import halves_of, stack_of
from isogrid.targets.gguf_tensors import Found, Placed, RowOrder, heads_of, name_map, name_of, tensors_of
from isogrid.targets.gguf_writing import Contents

FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
NEAR = 0.5
"""Share of the base's sum of squares up to which a difference is taken for what training and quantisation changed."""

OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")


class Way(NamedTuple):
    """How a converter may have changed a tensor: another order of rows, or, for float ones, other values."""

    order: RowOrder
    value: Tensor | None = None


def open_gguf(path: str | Path) -> gguf.GGUFReader:
    """A GGUF file; raises ArtifactError where it is missing, corrupt or truncated."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"There is no file {path}.")
    try:
        reader = gguf.GGUFReader(path)
        end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is no GGUF file, or corrupt or truncated: {error}.") from error
    if end > path.stat().st_size:
        raise ArtifactError(f"{path} is truncated: it ends before its last tensor.")
    return reader


def architecture_in(reader: gguf.GGUFReader) -> str:
    """The name of a file's architecture."""
    field = reader.get_field("general.architecture")
    return "" if field is None else str(field.contents())


def replaced(model: nn.Module, base: str | Path) -> tuple[Contents, list[Placed]]:
    """What is in a base, with a model's tensors in their places, and these.

    Args:
        model: of `isogrid.convert`, of transformers.
        base: a GGUF file in F32, F16 or BF16 of the float model.

    Raises:
        ArtifactError: the base is missing, corrupt or truncated.
        TargetError: the base is quantised, or of another model: an architecture without the model's tensors, other
            shapes, other values; the message names the first tensor.
        NonFiniteError: a weight holds NaN or infinity.
    """
    return replaced_tensors(tensors_of(model), model.config, base)


def replaced_tensors(tensors: Iterable[Found], config: Any, base: str | Path) -> tuple[Contents, list[Placed]]:
    """As `replaced`, of tensors that need not be a model's."""
    reader = open_gguf(base)
    architecture = architecture_in(reader)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in stored.values():
        if tensor.tensor_type not in FLOATS:
            raise TargetError(
                f"{base} is quantised: {tensor.name} is {tensor.tensor_type.name}. Give a base in F32, F16 or BF16."
            )
    matched = _matched(tensors, config, architecture, stored, Path(base))
    contents = contents_of(reader)
    contents.place(matched)
    return contents, matched


def contents_of(reader: gguf.GGUFReader) -> Contents:
    """All that a file holds, to be written again."""
    contents = Contents(architecture_in(reader))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in OWN_KEYS:
            kinds = field.types
            contents.typed.append((key, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None))
    contents.tensors = {tensor.name: (np.asarray(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    return contents


def _matched(
    tensors: Iterable[Found], config: Any, architecture: str, stored: dict[str, gguf.ReaderTensor], base: Path
) -> list[Placed]:
    names = name_map(architecture, config.get_text_config().num_hidden_layers)
    result: dict[str, Placed] = {}
    for found in tensors:
        for name, part in _places(found, names, stored):
            if name not in stored:
                raise TargetError(f"{base} has no tensor {name} for {found.source}: it is of another model.")
            tensor = _arranged(found, name, part, stored[name], config, base)
            if name in result:
                tensor = replace(tensor, sources=(*result[name].sources, *tensor.sources))
            result[name] = tensor
    left = [name for name in stored if name not in result and not name.startswith("rope_")]
    if left:
        raise TargetError(f"{base} has {left[0]}, which the model has not: it is of another model.")
    return list(result.values())


def _places(
    found: Found, names: gguf.TensorNameMap, stored: dict[str, gguf.ReaderTensor]
) -> Iterator[tuple[str, RowOrder]]:
    """The file's tensors that hold a model's tensor: one, or two where it has experts' gates apart from the rest."""
    whole = (stack_of(found.source) or (found.source,))[0]
    name = name_of(whole, names)
    if name == "output.weight" and name not in stored:
        name = "token_embd.weight"
    halves = [half for half in (name_of(half, names) for half in halves_of(found.source)) if half is not None]
    if name is None and not halves:
        raise TargetError(f"gguf's table of names has no place for {found.source} in this architecture.")
    pieces = [name] if name is not None and (name in stored or not halves) else halves
    for part, piece in enumerate(pieces):
        stacked = piece in stored and bool(stack_of(found.source))
        experts = stored[piece].data.shape[0] if stacked else 0
        yield piece, RowOrder(experts=experts, part=part, parts=len(pieces))


def _arranged(
    found: Found, name: str, part: RowOrder, tensor: gguf.ReaderTensor, config: Any, base: Path
) -> Placed:
    """A tensor in the way that comes next to the base's."""
    theirs = float_values(tensor)
    best: tuple[float, Placed] | None = None
    for way in _ways(found, part, config):
        candidate = Placed(name, found.value if way.value is None else way.value, (found,), way.order)
        ours = candidate.values()
        if ours.shape != theirs.shape and (way.value is None or ours.numel() != theirs.numel()):
            continue
        total = theirs.square().sum().clamp(min=1e-30)
        difference = float((ours.reshape(theirs.shape) - theirs).square().sum() / total)
        if best is None or difference < best[0]:
            best = difference, candidate
    if best is None:
        raise TargetError(
            f"{base}: {name} has shape {list(theirs.shape)} and {found.source} {list(found.value.shape)}: it is of "
            "another model."
        )
    if best[0] > NEAR:
        raise TargetError(
            f"{base}: {name} holds other values than {found.source}, in every order that is known: it is of another "
            "model, or from long before training. Convert the trained model's float weights and use that as base."
        )
    return best[1]


def _ways(found: Found, part: RowOrder, config: Any) -> Iterator[Way]:
    yield Way(part)
    if part.parts > 1:
        yield Way(replace(part, interleaved=True))
    rows = found.value.shape[0]
    heads = heads_of(found.source, config.get_text_config())
    if heads and rows % (2 * heads) == 0:
        yield Way(replace(part, heads=heads))
    if isinstance(found.value, Tensor) and found.value.dim() == 1:
        yield Way(part, found.value.float() + 1)
        yield Way(part, -found.value.float().exp())


def float_values(tensor: gguf.ReaderTensor) -> Tensor:
    """float32 values of a tensor in any type that gguf can read."""
    values = gguf.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
