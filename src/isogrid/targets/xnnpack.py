"""What XNNPACK runs in integers, for the runtimes that stand on it: ExecuTorch and LiteRT."""

from dataclasses import replace

import torch
from torch import nn

from isogrid.errors import TargetError
from isogrid.formats import ExponentGrid, Format, IntegerGrid, NativeGrid, PerChannel, PerTensor, named_format
from isogrid.layers.elementwise import IntegerAdd, IntegerMultiply
from isogrid.layers.xnnpack_kernels import PRODUCT_RATIOS, RATIOS
from isogrid.planning.graph import Call
from isogrid.planning.rules import Scheme

GROUPS = (32, 64, 128, 256)

ACTIVATION = "int8/tensor:asymmetric"


def static_scheme(scheme: Scheme) -> Scheme:
    """A static scheme with activations as XNNPACK stores them: int8 with a zero point, where it has 8 bits.

    >>> from isogrid.planning.rules import scheme_from_name
    >>> static_scheme(scheme_from_name("portable")).activation
    'int8/tensor:asymmetric,even,scale=e8m0'
    """
    grid, _, options = (scheme.activation or "").partition(":")
    if grid != "uint8/tensor":
        return scheme
    return replace(scheme, activation=f"{ACTIVATION},{options}" if options else ACTIVATION)


def why_not_static(call: Call, what: str) -> str | None:
    """None where XNNPACK has an integer kernel for a call; else why not.

    Args:
        call: of the model.
        what: the runtime, for the message.
    """
    if call.kind == "convolution" and len(call.shape) == 5:
        return f"{what} has no integer kernel for convolutions over three dimensions"
    if call.kind in ("add", "multiply") and len(call.inputs) < 2:
        return f"sums and products with numbers stay float in {what}"
    if call.kind == "multiply" and "div" in call.type:
        return f"{what} divides in float"
    if call.kind in ("linear", "convolution", "add", "multiply", "concat"):
        return None
    if call.kind == "average_pool":
        space = call.shape[2:]
        is_global = not call.pools_windows and (not space or len(space) == 2)
        return None if is_global else f"{what} averages codes over all of two dimensions only"
    if call.kind == "matmul":
        return f"{what} multiplies two activations in float, or with int8 rows that it quantises anew"
    return f"{call.type} has no integer kernel in {what}"


def check_static_format(kind: str, fmt: Format, call: Call, what: str) -> None:
    """Raise TargetError, with what to use instead, where XNNPACK's integer kernels do not take a format."""
    float32_scale = fmt.scale is not None and fmt.scale.grid in (NativeGrid(torch.float32), ExponentGrid())
    if kind == "activation":
        known = named_format(ACTIVATION)
        if fmt.grid != known.grid or not isinstance(fmt.granularity, PerTensor) or not float32_scale:
            raise TargetError(f"{call.name!r}: {what}'s integer kernels take activations as {ACTIVATION}, not {fmt}.")
        if fmt.zero_point is None:
            raise TargetError(f"{call.name!r}: {what} stores activations with a zero point. Use {ACTIVATION}.")
        return
    grid = fmt.grid
    integer = isinstance(grid, IntegerGrid) and not grid.midrise and grid.low >= -128 and grid.high <= 127
    whole = isinstance(fmt.granularity, PerTensor) or fmt.granularity == PerChannel(0)
    if not (integer and whole and fmt.is_symmetric and float32_scale):
        raise TargetError(
            f"{call.name!r}: {what}'s integer kernels take symmetric integer weights of up to 8 bits with a float32 "
            f"scale per channel or tensor, not {fmt}. Use int8/channel, int4/channel or ternary/channel."
        )


def check_dynamic_format(fmt: Format, call: Call, what: str) -> None:
    """Raise TargetError, with what to use instead, where XNNPACK's dynamic kernels do not take a weight."""
    known = {named_format("int8/channel"), *(named_format(f"int4/group{g}:scale=bfloat16") for g in GROUPS)}
    if fmt not in known:
        raise TargetError(
            f"{call.name!r}: {what} multiplies rows that it quantises itself by int8/channel, or by int4 in groups of "
            f"{', '.join(map(str, GROUPS))} on bfloat16 scales, not by {fmt}. Use int4/group32:scale=bfloat16, say."
        )


def check_steps(integer_model: nn.Module, what: str) -> None:
    """Raise TargetError where a sum or product has steps too far apart for XNNPACK's arithmetic."""
    for path, module in integer_model.named_modules():
        site = path.replace("operations.sites.", "")
        if isinstance(module, IntegerAdd):
            for name in module.names:
                ratio = float(module.grid(name)[0] / module.grid("output")[0])
                if not RATIOS[0] <= ratio < RATIOS[1]:
                    raise TargetError(
                        f"{site!r}: {what} adds codes whose step is {RATIOS[0]:.2g} to {RATIOS[1]:.0f} times the "
                        f"output's, and that of its {name} is {ratio:.3g} times. Keep it in float by a rule."
                    )
        elif isinstance(module, IntegerMultiply):
            a, b = (module.grid(name)[0] for name in module.names)
            ratio = float(a * b / module.grid("output")[0])
            if not PRODUCT_RATIOS[0] <= ratio < PRODUCT_RATIOS[1]:
                raise TargetError(
                    f"{site!r}: {what} multiplies codes where the product of their steps is {PRODUCT_RATIOS[0]:.2g} to "
                    f"{PRODUCT_RATIOS[1]:.0f} times the output's, and here it is {ratio:.3g} times. "
                    "Keep it in float by a rule."
                )
