"""Which rows of which weight a checkpoint keeps under which name.

transformers renames, splits and joins weights when it writes and reads checkpoints: the stacked experts of Mixtral
become `experts.0.w1`, `experts.0.w3`, ... To learn what becomes of each row, numbers of rows are sent through that
conversion in place of weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isogrid.errors import TargetError
from isogrid.formats import PerTensor, Quantized

_FIRST = 1 << 40
"""Where the numbers of rows begin, so that no tensor of a model is taken for them."""

Rows = dict[str, tuple[str, Tensor]]

STACKS = {
    "gate_up_projection": "gate_up_proj",
    "up_projection": "up_proj",
    "down_projection": "down_proj",
}
"""The parameters that experts are stacked in, by the layers that read them."""


class Converted(NamedTuple):
    """A state_dict as it is written to disk.

    Attributes:
        plain: tensors that are no quantised weights, by their names on disk.
        rows: for each name on disk, without `.weight`, the name of the weight here and the numbers of its rows.
    """

    plain: dict[str, Tensor]
    rows: Rows


def converted(model: nn.Module, plain: Mapping[str, Tensor], weights: Mapping[str, tuple[int, ...]]) -> Converted:
    """What transformers makes of a model's tensors when it writes them.

    Args:
        model: of transformers.
        plain: tensors by name.
        weights: for each quantised weight the shape of its rows: [out], or [experts, out] for a stack.

    Raises:
        TargetError: a weight is rearranged in a way that takes its rows apart.
    """
    from transformers.core_model_loading import revert_weight_conversion

    numbered: dict[str, Tensor] = {}
    bounds = []
    first = _FIRST
    for name, shape in weights.items():
        count = torch.Size(shape).numel()
        numbered[name] = torch.arange(first, first + count).reshape(*shape, 1)
        bounds.append((first, name))
        first += count
    state: Any = revert_weight_conversion(model, {**plain, **numbered})  # type: ignore[arg-type]
    found, rows = {}, {}
    for name, tensor in state.items():
        if tensor.dtype != torch.int64 or tensor.numel() == 0 or int(tensor.min()) < _FIRST:
            found[name] = tensor
            continue
        start, source = max(bound for bound in bounds if bound[0] <= int(tensor.min()))
        if tensor.dim() != 2 or tensor.shape[1] != 1:
            raise TargetError(
                f"{source!r} is stored as {name} {list(tensor.shape[:-1])}, which is no matrix by rows; "
                "compressed-tensors packs rows. Keep it in float by a rule."
            )
        rows[name.removesuffix(".weight")] = source, tensor.flatten() - start
    return Converted(found, rows)


def weight_name(path: str) -> str:
    """The name of a quantised layer's weight in transformers' own state_dict: its own, or the stack that it reads.

    >>> weight_name("model.layers.0.mlp.experts.down_projection"), weight_name("lm_head")
    ('model.layers.0.mlp.experts.down_proj', 'lm_head.weight')
    """
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{STACKS[leaf]}" if leaf in STACKS else f"{path}.weight"


def take_rows(quantized: Quantized, rows: Tensor) -> Quantized:
    """A quantised weight with only some of its rows, in their order.

    Raises:
        TargetError: rows that share scales would be parted.

    >>> from isogrid.formats import named_format
    >>> whole = named_format("int8/channel").quantize(torch.tensor([[1.0], [2.0], [3.0]]))
    >>> take_rows(whole, torch.tensor([2, 0])).dequantize().T
    tensor([[3., 1.]])
    """
    shape = (len(rows), *quantized.shape[1:])
    parts: dict[str, Any] = {
        name: part if isinstance(quantized.format.granularity, PerTensor) else _of_rows(part, rows, quantized.shape[0])
        for name, part in (("scale", quantized.scale), ("zero_point", quantized.zero_point))
        if part is not None
    }
    codes = quantized.codes[rows.to(quantized.codes.device)]
    return replace(quantized, codes=codes, shape=shape, **parts)


def _of_rows(part: Quantized, rows: Tensor, whole: int) -> Quantized:
    """The scales, or zero points, of some of `whole` rows."""
    height = whole // part.shape[0]
    tiles = rows.reshape(-1, height) if len(rows) % height == 0 else rows[:0].reshape(0, height)
    start = tiles[:, :1]
    if len(rows) % height or not torch.equal(tiles, start + torch.arange(height)) or (start % height).any():
        raise TargetError(
            f"Tiles of {height} rows share scales, and the checkpoint of this model parts them. Use a format with "
            "scales of single rows, or sizes that the tiles divide."
        )
    chosen = (start // height).flatten()
    return replace(take_rows(part, chosen), shape=(len(chosen), *part.shape[1:]))


def assembled(parts: Sequence[tuple[Tensor, Quantized]], shape: tuple[int, ...]) -> Quantized:
    """The weight whose rows are given in parts.

    Args:
        parts: numbers of rows, and the weight that they make.
        shape: of the whole.
    """
    order = torch.cat([rows for rows, _ in parts]).argsort()
    if len(parts) == 1 and torch.equal(order, torch.arange(len(order))):
        return parts[0][1]  # whole: scales that run on over rows, as those of double quantisation, need no order
    return _joined([part for _, part in parts], order, shape)


def _joined(parts: list[Quantized], order: Tensor, shape: tuple[int, ...]) -> Quantized:
    inner: dict[str, Any] = {}
    for name in ("scale", "zero_point"):
        pieces = [piece for piece in (getattr(part, name) for part in parts) if piece is not None]
        if pieces and isinstance(parts[0].format.granularity, PerTensor):
            inner[name] = pieces[0]
        elif pieces:
            count = sum(piece.shape[0] for piece in pieces)
            height = shape[0] // count
            inner[name] = _joined(pieces, order[::height] // height, (count, *pieces[0].shape[1:]))
    return replace(parts[0], codes=torch.cat([part.codes for part in parts])[order], shape=shape, **inner)
