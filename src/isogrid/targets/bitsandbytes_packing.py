"""The tensors of one weight in bitsandbytes' serialised layout, and back: functions of local tensors.

What `bitsandbytes.functional.QuantState.as_dict(packed=True)` writes in 0.50, held against it in tests.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import ArtifactError, TargetError
from isogrid.formats import Format, PerGroup, Quantized, named_format
from isogrid.formats.codebooks import BNB_FP4, NF4

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Values that may share a scale."""

FP4_NIBBLES = (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)
"""Twelve times what the nibbles of FP4 stand for."""

NIBBLES: dict[str, Tensor] = {
    "nf4": torch.tensor(NF4.table),
    "fp4": torch.tensor(FP4_NIBBLES) / 12,
}
"""What the 16 nibbles stand for, by the name of the type: `quant_map`."""

_TABLES = {"nf4": NF4, "fp4": BNB_FP4}
_DOUBLE = named_format("nf4-double").scale


def type_of(fmt: Format) -> str | None:
    """`nf4` or `fp4` where bitsandbytes stores a format; else None.

    >>> type_of(named_format("nf4-double")), type_of(named_format("nf4/group128")), type_of(named_format("q4_0"))
    ('nf4', 'nf4', None)
    """
    blocks = isinstance(fmt.granularity, PerGroup) and not fmt.granularity.pads and fmt.granularity.axis == -1
    if not blocks or _block(fmt) not in BLOCKS or fmt.scale not in (named_format("float32"), _DOUBLE):
        return None
    return next((name for name, grid in _TABLES.items() if grid == fmt.grid), None)


def pack(quantized: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight [out, in], by their names within the layer.

    Args:
        quantized: in a format of `type_of`.
        dtype: of the model, which readers decompress to.

    Raises:
        TargetError: bitsandbytes does not store the format.
    """
    kind, scale = type_of(quantized.format), quantized.scale
    if kind is None or scale is None:
        raise TargetError(f"bitsandbytes stores NF4 and FP4 in blocks of 32 to 4096, not {quantized.format}.")
    codes = _to_nibbles(kind)[quantized.codes.reshape(-1).long()]
    facts: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": _block(quantized.format),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(quantized.shape),
    }
    found = {
        "weight": (codes[::2] << 4 | codes[1::2]).unsqueeze(1),
        "weight.absmax": scale.codes.reshape(-1),
        "weight.quant_map": NIBBLES[kind].clone(),
    }
    if scale.scale is not None and scale.offset is not None:
        found["weight.nested_absmax"] = scale.scale.dequantize().reshape(-1)
        found["weight.nested_quant_map"] = scale.format.grid.values()
        offset = float(scale.offset.dequantize().reshape(-1)[0])
        facts |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(facts).encode()
    found[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return found


def unpack(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, int]) -> Quantized:
    """The weight that such tensors hold.

    Args:
        tensors: by their names within the layer.
        fmt: in which they were packed.
        shape: [out, in].

    Raises:
        ArtifactError: they are of another type, block or shape.
        KeyError: one is missing.
    """
    kind = type_of(fmt)
    assert kind is not None and fmt.scale is not None
    facts = json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{kind}"].tolist()))
    if facts["blocksize"] != _block(fmt) or tuple(facts["shape"]) != shape:
        raise ArtifactError(f"A weight {facts['shape']} in blocks of {facts['blocksize']} is not in {fmt}.")
    packed = tensors["weight"].reshape(-1)
    nibbles = torch.stack((packed >> 4, packed & 15), 1).reshape(shape)
    scale_shape = fmt.scale_shape(shape)
    absmax, inner = tensors["weight.absmax"].reshape(scale_shape), {}
    if fmt.scale.scale is not None and fmt.scale.offset is not None:
        largest = tensors["weight.nested_absmax"]
        mean = torch.tensor(facts["nested_offset"]).expand(largest.shape)
        inner = {"scale": fmt.scale.scale.quantize(largest), "offset": fmt.scale.offset.quantize(mean)}
    scale = Quantized(absmax, fmt.scale, scale_shape, **inner)
    return Quantized(_to_codes(kind)[nibbles.long()], fmt, shape, scale)


def _block(fmt: Format) -> int:
    granularity: Any = fmt.granularity
    return int(granularity.size)


def _to_codes(kind: str) -> Tensor:
    """The index of each nibble's value among all in ascending order, uint8 [16]."""
    return _TABLES[kind].encode(NIBBLES[kind])


def _to_nibbles(kind: str) -> Tensor:
    """The first nibble that stands for each value in ascending order, uint8 [values]."""
    of_code = _to_codes(kind).tolist()
    return torch.tensor([of_code.index(code) for code in range(len(_TABLES[kind].table))], dtype=torch.uint8)
