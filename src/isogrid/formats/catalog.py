"""The named formats and the grammar of their names.

`grid/granularity:option,option` composes a format; block formats go by the name that their runtime gives them.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache

import torch

from isogrid.errors import FormatError
from isogrid.formats.codebooks import BINARY, BNB_FP4, IQ4_NL, NF4, apot_grid, dynamic_grid, e8p_grid, log2_grid
from isogrid.formats.floats import ExponentGrid, FloatGrid, NativeGrid
from isogrid.formats.format import Format
from isogrid.formats.granularity import (
    Granularity,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerHead,
    PerTensor,
    PerTile,
    PerToken,
)
from isogrid.formats.grid import Grid, IntegerGrid
from isogrid.formats.local import LocalFp4Grid
from isogrid.formats.tables import ConstantGrid, LookupGrid

GRAMMAR = """grid/granularity[:option,...]
  grid: int1..int8, int16, uint1..uint8, uint16, fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, fp4_e2m1, nf4, bnb-fp4,
        ternary, binary, log2-2..log2-8, apot-3..apot-7, e8p
  granularity: tensor, channel, channel1 (axis 1), token, head, group32, tile16x16, flat256
  option: scale=float32|float16|bfloat16|e8m0|fp8_e4m3|fp8_e5m2, pad and axis=0 (groups), narrow, midrise,
        half_up, asymmetric (int), symmetric (uint), even (zero points)"""

_TERNARY = IntegerGrid(-1, 1)

_FLOATS: dict[str, Grid] = {
    "float32": NativeGrid(torch.float32),
    "float16": NativeGrid(torch.float16),
    "bfloat16": NativeGrid(torch.bfloat16),
    "fp8_e4m3": FloatGrid(4, 3, bias=7, non_finite=1),
    "fp8_e5m2": FloatGrid(5, 2, bias=15, non_finite=4),
    "fp6_e3m2": FloatGrid(3, 2, bias=3),
    "fp6_e2m3": FloatGrid(2, 3, bias=1),
    "fp4_e2m1": FloatGrid(2, 1, bias=1),
    "e8m0": ExponentGrid(),
}
_TABLES: dict[str, Callable[[], Grid]] = {
    "nf4": lambda: NF4,
    "bnb-fp4": lambda: BNB_FP4,
    "ternary": lambda: _TERNARY,
    "binary": lambda: BINARY,
    "e8p": e8p_grid,
}


def _plain(grid: Grid, name: str = "") -> Format:
    """Each value stored on its own, without a scale."""
    return Format(grid, name=name)


FLOAT32, FLOAT16, E8M0 = (_plain(_FLOATS[name], name) for name in ("float32", "float16", "e8m0"))


def _blocks(grid: Grid, size: int, scale: Format, offset: Format | None = None) -> Format:
    return Format(grid, PerGroup(size), scale, offset=offset)


def _signed(fmt: Format) -> Format:
    """With scales of either sign, as ggml's own quantisers use them where a grid has a longer side."""
    return replace(fmt, signed_scale=True)


def _of_bitsandbytes(grid: Grid, double: bool = False) -> Format:
    """Blocks of 64, whose scales are float32 or, doubly quantised, 8-bit in blocks of 256 around their mean."""
    mean = Format(ConstantGrid(1.0), PerTensor(), FLOAT32)
    return _blocks(grid, 64, Format(dynamic_grid(), PerFlatGroup(256), FLOAT32, offset=mean) if double else FLOAT32)


def _k_quant(grid: Grid, size: int, scale: IntegerGrid, least_offset: int | None = None) -> Format:
    """llama.cpp's K-quants: integer scales, and minima where there are any, on float16 scales of 256 values each.

    ggml subtracts minima, m * dmin; here they are offsets <= 0, so that the stored integer is -m.
    """
    per_super_block = 256 // size
    offset = None if least_offset is None else _blocks(IntegerGrid(least_offset, 0), per_super_block, FLOAT16)
    return _blocks(grid, size, _blocks(scale, per_super_block, FLOAT16), offset)


def _integers(bits: int, signed: bool = False) -> IntegerGrid:
    return IntegerGrid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else IntegerGrid(0, 2**bits - 1)


_BLOCK_FORMATS: dict[str, Callable[[], Format]] = {
    "q4_0": lambda: _signed(_blocks(_integers(4, signed=True), 32, FLOAT16)),
    "q4_1": lambda: _blocks(_integers(4), 32, FLOAT16, offset=FLOAT16),
    "q5_0": lambda: _signed(_blocks(_integers(5, signed=True), 32, FLOAT16)),
    "q5_1": lambda: _blocks(_integers(5), 32, FLOAT16, offset=FLOAT16),
    "q8_0": lambda: _blocks(_integers(8, signed=True), 32, FLOAT16),
    "q2_k": lambda: _k_quant(_integers(2), 16, _integers(4), least_offset=-15),
    "q3_k": lambda: _signed(_k_quant(_integers(3, signed=True), 16, _integers(6, signed=True))),
    "q4_k": lambda: _k_quant(_integers(4), 32, _integers(6), least_offset=-63),
    "q5_k": lambda: _k_quant(_integers(5), 32, _integers(6), least_offset=-63),
    "q6_k": lambda: _signed(_k_quant(_integers(6, signed=True), 16, _integers(8, signed=True))),
    "iq4_nl": lambda: _signed(_blocks(IQ4_NL, 32, FLOAT16)),
    "q1_0": lambda: _blocks(BINARY, 128, FLOAT16),
    "q2_0": lambda: _signed(_blocks(IntegerGrid(-1, 2), 64, FLOAT16)),
    # Five ternary digits in a byte, but the last 16 of 256 in four bytes: 52 bytes.
    "tq1_0": lambda: replace(_blocks(_TERNARY, 256, FLOAT16), code_bits=1.625),
    "tq2_0": lambda: _blocks(_TERNARY, 256, FLOAT16),
    "mxfp4": lambda: _blocks(_FLOATS["fp4_e2m1"], 32, E8M0),
    "mxfp6_e3m2": lambda: _blocks(_FLOATS["fp6_e3m2"], 32, E8M0),
    "mxfp6_e2m3": lambda: _blocks(_FLOATS["fp6_e2m3"], 32, E8M0),
    "mxfp8_e4m3": lambda: _blocks(_FLOATS["fp8_e4m3"], 32, E8M0),
    "mxfp8_e5m2": lambda: _blocks(_FLOATS["fp8_e5m2"], 32, E8M0),
    "nvfp4": lambda: _blocks(_FLOATS["fp4_e2m1"], 16, Format(_FLOATS["fp8_e4m3"], PerTensor(), FLOAT32)),
    "nf4": lambda: _of_bitsandbytes(NF4),
    "nf4-double": lambda: _of_bitsandbytes(NF4, double=True),
    "bnb-fp4": lambda: _of_bitsandbytes(BNB_FP4),
    "bnb-fp4-double": lambda: _of_bitsandbytes(BNB_FP4, double=True),
    "bitnet": lambda: Format(_TERNARY, PerTensor(), FLOAT32),
    "ternary": lambda: Format(_TERNARY, PerChannel(), FLOAT32),
    "binary": lambda: Format(BINARY, PerChannel(), FLOAT32),
    "e8p": lambda: Format(e8p_grid(), PerTensor(), FLOAT32),
}


def nvfp4_on(global_scale: float) -> Format:
    """NVFP4 with a given scale of scales.

    >>> nvfp4_on(2.0**-10).scale.fake_quantize(torch.tensor([[0.1], [9.0]])).T
    tensor([[0.1016, 0.4375]])
    """
    scale = Format(_FLOATS["fp8_e4m3"], PerTensor(), _plain(ConstantGrid(global_scale)))
    return _blocks(_FLOATS["fp4_e2m1"], 16, scale)


_EXAMPLES = (
    "int8/channel",
    "int8/channel:narrow",
    "int8/tensor:asymmetric",
    "uint8/tensor:half_up",
    "int4/group128:scale=bfloat16",
    "int4/group32:pad",
    "int4/group8:axis=0",
    "int2/channel:midrise",
    "int16/tensor",
    "uint8/tensor",
    "uint8/tensor:even,scale=e8m0",
    "uint8/token",
    "uint4/group32",
    "uint4/tensor:symmetric",
    "fp8_e4m3/tensor",
    "fp8_e5m2/token",
    "fp4_e2m1/tile16x16",
    "nf4/group128",
    "ternary/group256",
    "log2-4/channel",
    "apot-4/channel",
)


def format_names() -> list[str]:
    """The named formats: floats, block formats, and examples of the grammar.

    >>> "q4_k" in format_names()
    True
    """
    return [*_FLOATS, *_BLOCK_FORMATS, *_EXAMPLES]


@lru_cache(maxsize=256)
def named_format(name: str) -> Format:
    """The format of a name.

    A name is that of a block format as its runtime calls it (`q4_k`, `nvfp4`), a float type (`float16`: values
    are rounded to it, without a scale), or a composition `grid/granularity:options`:

    - `intN` holds -2**(N-1) .. 2**(N-1)-1 and is symmetric: a scale, no zero point. `narrow` drops the lowest value,
      `midrise` shifts all by a half so that there is no zero, `asymmetric` adds a zero point stored as intN.
      One bit is {-1, 0}; weights want `binary` or `int1/...:midrise`, {-1/2, 1/2}.
    - `uintN` holds 0 .. 2**N-1 and has a zero point stored as uintN; `symmetric` drops the zero point, `narrow` the 0.
    - `half_up` rounds ties of integers up instead of to the even one.
    - `even` allows even zero points only, so that it makes no difference whether a runtime rounds before or after it
      adds them.
    - `scale=...` says how the scale is stored: float32 unless said, or another float type.
    - `nvfp4-local` is for inputs: NVFP4 whose scales are chosen as values come, on one power of two for all.
    - `nvfp4:global=N` is nvfp4 whose scale of scales is 2**N, whatever the tensor: layers that share one can be fused.
    - `pad` lets the last group of a row be short; it is stored in full. `axis=0` cuts groups from that dimension
      instead of the last.

    Raises:
        FormatError: no such name; the message suggests the nearest one and shows the grammar.

    >>> named_format("int4/group32").bits_per_value((8, 64))
    5.0
    >>> named_format("int4/chanel")
    Traceback (most recent call last):
    isogrid.errors.FormatError: Unknown granularity 'chanel' in format 'int4/chanel'. Did you mean 'channel'?
    ...
    """
    if name in _FLOATS:
        return _plain(_FLOATS[name], name)
    if name == "nvfp4-local":
        return Format(LocalFp4Grid(), PerTensor(), E8M0, name=name)
    if name in _BLOCK_FORMATS:
        return replace(_BLOCK_FORMATS[name](), name=name)
    if match := re.fullmatch(r"nvfp4:global=(-?\d{1,2})", name):
        return replace(nvfp4_on(2.0 ** int(match[1])), name=name)
    try:
        return _composed(name)
    except _UnknownWordError as unknown:
        raise FormatError(
            f"{unknown}\nA name is one of {', '.join([*_FLOATS, *_BLOCK_FORMATS])},\nor {GRAMMAR}"
        ) from None
    except FormatError as error:
        raise FormatError(f"Format {name!r}: {error}") from None


class _UnknownWordError(FormatError):
    """A part of a name that no list has."""

    def __init__(self, kind: str, word: str, name: str, known: list[str]):
        nearest = get_close_matches(word, known, n=1, cutoff=0.5)
        where = "" if word == name else f" in format {name!r}"
        super().__init__(f"Unknown {kind} {word!r}{where}." + (f" Did you mean {nearest[0]!r}?" if nearest else ""))


def _composed(name: str) -> Format:
    head, colon, tail = name.partition(":")
    grid_name, slash, granularity_name = head.partition("/")
    if not slash:
        raise _UnknownWordError("format", name, name, format_names())
    options = _options(tail.split(",") if colon else [], name)
    grid = _grid(grid_name, name)
    granularity = _granularity(granularity_name, name)
    scale = _scale(options.pop("scale", "float32"), name)
    zero_point = None
    if re.fullmatch(r"u?int\d+", grid_name) and isinstance(grid, IntegerGrid):
        grid, zero_point = _integer_options(grid, options)
    if zero_point is not None and options.pop("even", None) is not None:
        zero_point = _plain(_even(zero_point.grid))
    if isinstance(granularity, PerGroup):
        granularity = replace(granularity, pads=options.pop("pad", None) is not None, axis=_axis(options))
    if options:
        raise FormatError(f"the option {', '.join(map(repr, options))} has no meaning for {head}.")
    return Format(grid, granularity, scale, zero_point, name=name)


def _options(words: list[str], name: str) -> dict[str, str]:
    """The options by name; those that are words of their own have an empty value."""
    known = ["scale", "narrow", "midrise", "half_up", "symmetric", "asymmetric", "even", "pad", "axis"]
    options: dict[str, str] = {}
    for word in words:
        option, equals, value = word.partition("=")
        if option not in known:
            raise _UnknownWordError("option", option, name, known)
        if option in options or bool(equals) != (option in ("scale", "axis")):
            raise FormatError(f"options are named once each, and scale and axis take a value; {word!r} is not so.")
        options[option] = value
    return options


def _axis(options: dict[str, str]) -> int:
    """The dimension that groups are cut from."""
    word = options.pop("axis", "-1")
    if not re.fullmatch(r"-?\d+", word):
        raise FormatError(f"an axis is a whole number, as in axis=0, not {word!r}.")
    return int(word)


def _integer_options(grid: IntegerGrid, options: dict[str, str]) -> tuple[IntegerGrid, Format | None]:
    """The grid and the zero point's format that the options of integers ask for."""
    stored = _plain(grid)
    half_up = options.pop("half_up", None) is not None
    if grid.low == 0:
        if options.pop("narrow", None) is not None:
            grid = replace(grid, low=1)
        return replace(grid, half_up=half_up), None if options.pop("symmetric", None) is not None else stored
    zero_point = None if options.pop("asymmetric", None) is None else stored
    if options.pop("narrow", None) is not None:
        grid = replace(grid, low=-grid.high)
    if half_up:
        grid = replace(grid, half_up=True)
    if not half_up and zero_point is None and options.pop("midrise", None) is not None:
        grid = replace(grid, midrise=True)
    return grid, zero_point


def _even(grid: Grid) -> Grid:
    return LookupGrid(tuple(value for value in grid.values().tolist() if value % 2 == 0))


def _grid(word: str, name: str) -> Grid:
    if word.startswith("fp") and word in _FLOATS:
        return _FLOATS[word]
    if word in _TABLES:
        return _TABLES[word]()
    if match := re.fullmatch(r"(u?)int([1-8]|16)", word):
        return _integers(int(match[2]), signed=not match[1])
    if match := re.fullmatch(r"(log2|apot)-(\d+)", word):
        return (log2_grid if match[1] == "log2" else apot_grid)(int(match[2]))
    known = [
        *(f for f in _FLOATS if f.startswith("fp")),
        *_TABLES,
        *(f"{u}int{n}" for u in ("", "u") for n in (*range(1, 9), 16)),
        "log2-4",
        "apot-4",
    ]
    raise _UnknownWordError("grid", word, name, known)


def _granularity(word: str, name: str) -> Granularity:
    if word == "tensor":
        return PerTensor()
    if word == "token":
        return PerToken()
    if word == "head":
        return PerHead()
    if match := re.fullmatch(r"channel(-?\d+)?", word):
        return PerChannel(int(match[1] or 0))
    if match := re.fullmatch(r"(group|flat)(\d+)", word):
        return (PerGroup if match[1] == "group" else PerFlatGroup)(int(match[2]))
    if match := re.fullmatch(r"tile(\d+)x(\d+)", word):
        return PerTile(int(match[1]), int(match[2]))
    raise _UnknownWordError(
        "granularity", word, name, ["tensor", "channel", "token", "head", "group32", "tile16x16", "flat256"]
    )


def _scale(word: str, name: str) -> Format:
    if word not in _FLOATS:
        raise _UnknownWordError("scale type", word, name, list(_FLOATS))
    return _plain(_FLOATS[word], word)
