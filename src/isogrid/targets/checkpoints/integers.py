"""Integer weights in the checkpoints of AWQ, GPTQ and compressed-tensors, as one description of what they hold."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import CheckpointError
from isogrid.formats import Format, IntegerGrid, PerChannel, PerGroup, Quantized
from isogrid.targets.compressed_tensors.packing import unpack_words

AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the columns 0 to 7 of eight neighbours lie in a word of AutoAWQ."""

SUFFIXES = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale"),
)
"""The tensors that stand for a weight, within its layer."""


@dataclass(frozen=True)
class Integers:
    """A weight `(codes - zero) * scale`.

    Attributes:
        codes: uint8 [out, in] in 0 .. 2**bits - 1.
        scale: [out, groups], in the dtype of the file; each is that of in / groups neighbours.
        zero: uint8 [out, groups].
        bits: of a code.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    @property
    def is_symmetric(self) -> bool:
        """Whether all zero points are the middle of the codes, so that none has to be stored."""
        return bool((self.zero == 1 << self.bits - 1).all())

    @property
    def format_name(self) -> str:
        """The format that holds it: `uint4/group128:scale=float16`."""
        groups, columns = self.scale.shape[1], self.codes.shape[1]
        blocks = "channel" if groups == 1 else f"group{columns // groups}"
        sign = "" if self.is_symmetric else "u"
        return f"{sign}int{self.bits}/{blocks}:scale={str(self.scale.dtype).removeprefix('torch.')}"

    def values(self) -> Tensor:
        """The weight float32 [out, in]."""
        size = self.codes.shape[1] // self.scale.shape[1]
        scale, zero = (part.float().repeat_interleave(size, 1) for part in (self.scale, self.zero))
        return (self.codes.float() - zero) * scale

    def quantized(self, fmt: Format) -> Quantized | None:
        """The same weight in a format; None where the format cannot hold it."""
        shape = tuple(self.codes.shape)
        grid, scale = fmt.grid, fmt.scale
        plain = isinstance(grid, IntegerGrid) and not grid.midrise and grid.high - grid.low == (1 << self.bits) - 1
        known = isinstance(fmt.granularity, PerGroup | PerChannel)
        if not isinstance(grid, IntegerGrid) or not plain or not known or scale is None or fmt.offset is not None:
            return None
        if fmt.scale_shape(shape) != tuple(self.scale.shape) or (fmt.zero_point is None and not self.is_symmetric):
            return None
        stored = scale.quantize(self.scale.float())
        if not torch.equal(stored.dequantize(), self.scale.float()):
            return None
        zero_point = None
        if fmt.zero_point is not None:
            zero_point = fmt.zero_point.quantize(self.zero.float() + grid.low)
        codes = (self.codes.to(torch.int16) + grid.low).to(grid.code_dtype)
        return Quantized(codes, fmt, shape, stored, zero_point)


def integers_in(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Integers]]:
    """The quantised weights of a checkpoint, by the names of their layers.

    Args:
        tensors: all of the checkpoint.
        config: its `quantization_config`.

    Raises:
        CheckpointError: the layout is another one, or stores what no grid of neighbours holds.
    """
    method = config.get("quant_method")
    if method == "awq" and str(config.get("version", "gemm")).lower() == "gemm" and config.get("bits", 4) == 4:
        read, mark = _awq, "qweight"
    elif method == "gptq":
        read, mark = _gptq, "qweight"
    elif method == "compressed-tensors":
        read, mark = _compressed, "weight_scale"
    else:
        raise CheckpointError(
            f"The checkpoint was quantised by {method!r} (version {config.get('version', 'none')}, "
            f"{config.get('bits', '?')} bits). Known are AutoAWQ's gemm with 4 bits, GPTQ and compressed-tensors."
        )
    for name in tensors:
        if name.endswith(f".{mark}"):
            layer = name.removesuffix(f".{mark}")
            names = {leaf: f"{layer}.{leaf}" for leaf in (*SUFFIXES, "weight")}
            inside = {leaf: tensors[own] for leaf, own in names.items() if own in tensors}
            try:
                yield layer, read(layer, inside, config)
            except KeyError as error:
                raise CheckpointError(f"The checkpoint lacks {layer}.{error.args[0]}. Copy it anew.") from error


def _awq(layer: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Integers:
    """AutoAWQ's gemm: eight columns of `weight.T` in a word, those with even numbers first."""
    scale = tensors["scales"]
    codes = _columns_of_awq(tensors["qweight"])
    symmetric = torch.full_like(scale, 8, dtype=torch.uint8)
    zero = _columns_of_awq(tensors["qzeros"]) if "qzeros" in tensors else symmetric
    return _checked(layer, codes, scale, zero, 4)


def _columns_of_awq(words: Tensor) -> Tensor:
    """uint8 [rows, columns] of int32 [rows, columns / 8]."""
    return unpack_words(words, 4, 8 * words.shape[1]).reshape(len(words), -1, 8)[..., list(AWQ_COLUMNS)].flatten(1)


def _gptq(layer: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Integers:
    """AutoGPTQ's and GPTQModel's: rows of `weight.T` packed one below the other; zero points less one in version 1."""
    bits, scale = int(config["bits"]), tensors["scales"]
    rows = tensors["qweight"].shape[0] * 32 // bits
    codes = unpack_words(tensors["qweight"].T.contiguous(), bits, rows).T
    stored = unpack_words(tensors["qzeros"], bits, scale.shape[1])
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        if (stored == (1 << bits) - 1).any():
            raise CheckpointError(
                f"{layer} has zero points of 0, which its layout (GPTQ version 1) stores as -1 and runtimes read as 0, "
                f"as {1 << bits}, or into the neighbour. Save it as gptq_v2."
            )
        stored = stored + 1
    _check_order(layer, tensors.get("g_idx"), rows, len(scale))
    return _checked(layer, codes, scale, stored, bits)


def _compressed(layer: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Integers:
    """compressed-tensors' pack-quantized and int-quantized."""
    scale = tensors["weight_scale"]
    if "weight_packed" not in tensors and tensors["weight"].dtype == torch.int8:
        codes = (tensors["weight"].to(torch.int16) + 128).to(torch.uint8)
        scale = scale.reshape(-1, 1).expand(len(codes), -1) if scale.numel() == 1 else scale
        return _checked(layer, codes.T, scale.T, torch.full_like(scale, 128, dtype=torch.uint8).T, 8)
    if "weight_shape" not in tensors:
        raise CheckpointError(
            f"{layer} is not stored in integers. Of compressed-tensors' layouts these two are read: pack-quantized and "
            "int-quantized."
        )
    rows, columns = (int(n) for n in tensors["weight_shape"])
    bits = _bits_of(layer, config)
    codes = unpack_words(tensors["weight_packed"], bits, columns)
    zero = torch.full_like(scale, 1 << bits - 1, dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        zero = unpack_words(tensors["weight_zero_point"].T.contiguous(), bits, rows).T
    _check_order(layer, tensors.get("weight_g_idx"), columns, scale.shape[1])
    return _checked(layer, codes.T, scale.T, zero.T, bits)


def _bits_of(layer: str, config: Mapping[str, Any]) -> int:
    """Of the group in `config_groups` that names the layer, or of the only one."""
    groups = list(config["config_groups"].values())
    named = [group for group in groups if layer in group["targets"]]
    widths = {int(group["weights"]["num_bits"]) for group in named or groups}
    if len(widths) != 1:
        raise CheckpointError(f"config.json does not say by its name how many bits {layer} has: {sorted(widths)}.")
    return widths.pop()


def _check_order(layer: str, groups: Tensor | None, columns: int, count: int) -> None:
    """Groups must be of neighbours; raises CheckpointError."""
    if groups is None or groups.numel() == 0 or bool((groups < 0).all()):
        return
    if not torch.equal(groups.cpu().long(), torch.arange(columns) // (columns // count)):
        raise CheckpointError(
            f"{layer} was quantised in the order of its activations (desc_act): columns that lie apart share a scale "
            "(g_idx), and a grid here is one of neighbours, as the kernels of vLLM and llama.cpp read them. Quantise "
            "it with desc_act=False, or with static_groups=True."
        )


def _checked(layer: str, codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Integers:
    """From [in, out], [groups, out] and [groups, out]."""
    fits = codes.shape[1] == scale.shape[1] and len(scale) > 0 and len(codes) % len(scale) == 0
    if not fits or zero.shape != scale.shape or not scale.isfinite().all():
        raise CheckpointError(
            f"{layer} is corrupt: codes {list(codes.T.shape)} do not go with scales {list(scale.T.shape)} and zero "
            f"points {list(zero.T.shape)}, or a scale is not finite. Copy the checkpoint anew."
        )
    return Integers(codes.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), bits)
