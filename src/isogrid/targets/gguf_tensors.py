"""The tensors of a converted model as a GGUF file holds them: under its names, in its order of rows, in its bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from torch import Tensor, nn

from isogrid.errors import FormatError, NonFiniteError, TargetError
from isogrid.formats import Format, NativeGrid, Quantized, named_format
from isogrid.formats.ggml import BITNET_WEIGHT, LAYOUTS, ggml_name, pack_blocks, unpack_blocks
from isogrid.layers.borrowed import TurnedLinear
from isogrid.layers.stored import StoredWeight
from isogrid.targets.gguf_architectures import Architecture
from isogrid.targets.gguf_experts import experts_in, halves_of, is_stack, stack_of

HALVES = {torch.float16: GgmlType.F16, torch.bfloat16: GgmlType.BF16, torch.float32: GgmlType.F32}
HEAD = "lm_head.weight"
"""The output layer in checkpoints; gguf's tables leave it out for families that never have one of their own."""

FORMATS = {GgmlType[name.upper()]: name for name in LAYOUTS if name.upper() in GgmlType.__members__}
"""The names of formats by the types that the installed gguf package knows."""

TERNARY = named_format(BITNET_WEIGHT)
"""A weight of BitNet: blocks of TQ2_0 that have one scale."""


@dataclass(frozen=True)
class RowOrder:
    """Which rows of a tensor a file's tensor has, and in which order.

    Attributes:
        heads: where not 0, rows are those of so many heads, whose rotary pairs lie side by side in the file; in a
            checkpoint row n of a head is turned together with row n + head / 2.
        experts: where not 0, rows are those of so many matrices, and the file's tensor has three dimensions.
        part, parts: the file has this part of each matrix's rows, of so many.
        interleaved: a part is every second row rather than a half.
    """

    heads: int = 0
    experts: int = 0
    part: int = 0
    parts: int = 1
    interleaved: bool = False

    def indices(self, rows: int) -> Tensor:
        """The file's row n is row indices[n] of the model's.

        >>> RowOrder(heads=1).indices(4), RowOrder(experts=2, part=1, parts=2).indices(8)
        (tensor([0, 2, 1, 3]), tensor([2, 3, 6, 7]))
        """
        numbers = torch.arange(rows)
        if self.heads:
            return numbers.reshape(self.heads, 2, -1).transpose(1, 2).flatten()
        if self.interleaved:
            return numbers[self.part :: self.parts]
        return numbers.reshape(max(1, self.experts), self.parts, -1)[:, self.part].flatten()

    def of(self, rows: Tensor) -> Tensor:
        """Rows [rows, ...] as the file has them."""
        chosen = rows if self == RowOrder() else rows[self.indices(len(rows))]
        return chosen.reshape(self.experts, -1, *chosen.shape[1:]) if self.experts else chosen


@dataclass(frozen=True)
class Found:
    """A tensor of a converted model.

    Attributes:
        path: of its module.
        source: its name in a float checkpoint.
        value: as stored, or float.
    """

    path: str
    source: str
    value: Quantized | Tensor


@dataclass(frozen=True)
class Placed:
    """A tensor of a model, and where a GGUF file has it.

    Attributes:
        name: in the file.
        value: as stored, or float.
        sources: the same tensors of the model: tied ones are written once.
        order: of its rows.
    """

    name: str
    value: Quantized | Tensor
    sources: tuple[Found, ...]
    order: RowOrder = RowOrder()

    def data(self) -> tuple[np.ndarray[Any, Any], GgmlType]:
        """What the file holds, rows in its order, and ggml's type of it."""
        data, kind = packed(self.value)
        return self.order.of(data).numpy(), kind

    def values(self) -> Tensor:
        """float32, as the file has them."""
        return self.order.of(self.value.float() if isinstance(self.value, Tensor) else self.value.dequantize())


def packed(value: Quantized | Tensor) -> tuple[Tensor, GgmlType]:
    """The bytes of a tensor, uint8 [..., bytes of a row]; float32, whole, where it is float.

    Raises:
        TargetError: ggml does not store this format.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().to(torch.float32).contiguous(), GgmlType.F32
    grid = value.format.grid
    if isinstance(grid, NativeGrid) and value.format.scale is None and grid.dtype in HALVES:
        return value.codes.cpu().contiguous().view(torch.uint8), HALVES[grid.dtype]
    value = in_blocks(value) if value.format == TERNARY else value
    name = ggml_name(value.format)
    if name is None or name not in FORMATS.values():
        known = ", ".join(FORMATS.values())
        raise TargetError(f"The installed gguf does not store {value.format}. Use one of {known}.")
    try:
        return pack_blocks(value).cpu(), GgmlType[name.upper()]
    except FormatError as error:
        raise TargetError(str(error)) from error


def in_one(value: Quantized) -> Quantized:
    """Undo `in_blocks`; what has blocks of different scales is returned as it is."""
    assert value.scale is not None and TERNARY.scale is not None
    scales = value.scale.codes.flatten()
    if scales.numel() == 0 or not torch.equal(scales, scales[:1].expand_as(scales)):
        return value
    shape = TERNARY.scale_shape(value.shape)
    scale = Quantized(scales[:1].reshape(shape), TERNARY.scale, shape)
    return Quantized(value.codes, TERNARY, value.shape, scale=scale)


def in_blocks(value: Quantized) -> Quantized:
    """A ternary tensor with one scale as TQ2_0, whose blocks all have it."""
    fmt = named_format("tq2_0")
    assert value.scale is not None and fmt.scale is not None
    shape = fmt.scale_shape(value.shape)
    scale = value.scale.codes.reshape(1).expand(prod(shape)).reshape(shape)
    return Quantized(value.codes, fmt, value.shape, scale=Quantized(scale, fmt.scale, shape))


def unpacked(data: np.ndarray[Any, Any], kind: GgmlType, shape: tuple[int, ...], fmt: Format) -> Quantized | Tensor:
    """The numbers behind the bytes of a file, `packed` undone.

    Args:
        data: uint8 [..., bytes of a row].
        kind: ggml's type.
        shape: of the tensor.
        fmt: that is expected; where the file has another type, the result is in that type's format.
    """
    raw = torch.from_numpy(np.ascontiguousarray(data).copy())
    for dtype, number in HALVES.items():
        if kind == number:
            values = raw.view(torch.uint8).view(dtype).reshape(shape)
            return values if dtype == torch.float32 else Quantized(values, named_format(str(dtype)[6:]), shape)
    if kind not in FORMATS:
        raise TargetError(f"The file has a tensor of type {kind.name}, which Isogrid does not read.")
    expected = fmt if ggml_name(fmt) == FORMATS[kind] else named_format(FORMATS[kind])
    return unpack_blocks(raw, expected, shape)


def tensors_of(model: nn.Module) -> Iterator[Found]:
    """All weights of a converted model.

    Raises:
        NonFiniteError: one holds NaN or infinity.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        stored = isinstance(module, StoredWeight)
        name = checkpoint_name(model, path) if stored else path
        if isinstance(module, StoredWeight):
            yield Found(path, f"{name}.weight", module.quantized)
        tensors = [*module._parameters.items(), *([("bias", getattr(module, "bias", None))] if stored else [])]
        for own, tensor in tensors:
            if tensor is None:
                continue
            if not tensor.isfinite().all():
                raise NonFiniteError(f"{name}.{own} holds NaN or infinity. Go back to a checkpoint from before that.")
            yield Found(path, f"{name}.{own}".lstrip("."), _as_rows(module, own, tensor.detach()))


def _as_rows(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter of transformers with its outputs in front: those of GPT-2 and of some experts are turned."""
    if type(module).__name__ == "Conv1D" and tensor.dim() == 2:  # [in, out]
        return tensor.t()
    if is_stack(name):
        turned = getattr(module, "is_transposed", False) and tensor.dim() == 3
        return (tensor.transpose(1, 2) if turned else tensor).flatten(0, 1)
    return tensor


def checkpoint_name(model: nn.Module, path: str) -> str:
    """What a float model calls the layer at a path of a prepared one."""
    parent, _, last = path.rpartition(".")
    return parent if last == "linear" and isinstance(model.get_submodule(parent), TurnedLinear) else path


def placed(model: nn.Module, architecture: Architecture) -> list[Placed]:
    """The tensors of a model as a file of its architecture has them.

    Raises:
        TargetError: a tensor has no place in such a file; it is named.
        NonFiniteError: see `tensors_of`.
    """
    config: Any = model.config
    names = name_map(architecture.name, config.num_hidden_layers)
    result: dict[str, Placed] = {}
    for found in tensors_of(model):
        value = found.value
        if architecture.adds_one_to_norms and found.source.endswith("norm.weight") and isinstance(value, Tensor):
            value = value.float() + 1
        for source, order in _pieces(found.source, config, architecture):
            name = "output.weight" if source == HEAD else name_of(source, names)
            if name is None:
                raise TargetError(
                    f"llama.cpp's {architecture.name} has no place for {found.source}. Export with base=, see the docs."
                )
            result[name] = Placed(name, value, (found,), order)
    return list(tied(result, architecture).values())


def _pieces(source: str, config: Any, architecture: Architecture) -> list[tuple[str, RowOrder]]:
    """The tensors that a converter makes of one, and their rows in it."""
    stack = halves_of(source) or stack_of(source)
    if not stack:
        heads = heads_of(source, config) if architecture.rotates_pairs else 0
        return [(source, RowOrder(heads=heads))]
    interleaved = architecture.interleaves_gates and len(stack) > 1
    order = RowOrder(experts=experts_in(config), parts=len(stack), interleaved=interleaved)
    return [(name, replace(order, part=number)) for number, name in enumerate(stack)]


def tied(tensors: dict[str, Placed], architecture: Architecture) -> dict[str, Placed]:
    """The same with embedding and output as one tensor where they hold the same.

    Raises:
        TargetError: they differ, and llama.cpp has but one for this architecture.
    """
    head, embedding = tensors.get("output.weight"), tensors["token_embd.weight"]
    if head is None:
        return tensors
    if _same(head.value, embedding.value):
        sources = (*embedding.sources, *head.sources)
        rest = {name: tensor for name, tensor in tensors.items() if name != "output.weight"}
        return {**rest, "token_embd.weight": replace(embedding, sources=sources)}
    if not architecture.has_head:
        raise TargetError(
            f"{architecture.name} has one tensor in llama.cpp for embedding and output, and here they differ: "
            f"{_kind(embedding.value)} and {_kind(head.value)}. Give both one format by a rule."
        )
    return tensors


def name_of(source: str, names: gguf.TensorNameMap) -> str | None:
    """The file's name of a tensor; None where gguf's table has none."""
    name: str | None = names.get_name(source, (".weight", ".bias"))
    return f"{name}.weight" if name and not name.endswith((".weight", ".bias")) else name


def name_map(architecture: str, blocks: int) -> gguf.TensorNameMap:
    """gguf's table from the names of checkpoints to those of files; TargetError where it has no such architecture."""
    for number, name in gguf.MODEL_ARCH_NAMES.items():
        if name == architecture:
            return gguf.get_tensor_name_map(number, blocks)
    raise TargetError(f"The installed gguf package does not know the architecture {architecture!r}. Upgrade it.")


def heads_of(source: str, config: Any) -> int:
    """How many heads the rows of a projection of queries or keys belong to; 0 for other tensors."""
    queries = config.num_attention_heads
    heads: dict[str, int] = {"q_proj": queries, "k_proj": getattr(config, "num_key_value_heads", None) or queries}
    return heads.get(source.rpartition(".")[0].rpartition(".")[2], 0)


def _same(a: Quantized | Tensor, b: Quantized | Tensor) -> bool:
    (first, kind), (second, other) = packed(a), packed(b)
    return kind == other and torch.equal(first, second)


def _kind(value: Quantized | Tensor) -> str:
    return "float" if isinstance(value, Tensor) else str(value.format)
