"""What XNNPACK runs in integers, for the runtimes that stand on it: ExecuTorch and LiteRT."""

from dataclasses import replace

import torch
from torch import nn

from isogrid.errors import TargetError
from isogrid.formats import Format, IntegerGrid, NativeGrid, PerChannel, PerTensor, named_format
from isogrid.layers.elementwise import IntegerAdd
from isogrid.layers.xnnpack_kernels import RATIOS
from isogrid.planning.graph import Call
from isogrid.planning.rules import Scheme

ACTIVATION = "int8/tensor:asymmetric"


def static_scheme(scheme: Scheme) -> Scheme:
    """A static scheme with activations as XNNPACK stores them: int8 with a zero point, where it has 8 bits."""
    return replace(scheme, activation=ACTIVATION) if scheme.activation == "uint8/tensor" else scheme


def why_not_static(call: Call, what: str) -> str | None:
    """None where XNNPACK has an integer kernel for a call; else why not.

    Args:
        call: of the model.
        what: the runtime, for the message.
    """
    if call.kind == "convolution" and len(call.shape) == 5:
        return f"{what} has no integer kernel for convolutions over three dimensions"
    if call.kind == "add" and not call.is_plain_sum:
        return f"{what} adds two tensors; differences and sums with numbers stay float"
    if call.kind == "add" and not call.is_plain_sum:
        return f"differences, and sums with numbers or parameters, stay float in {what}"
    if call.kind in ("linear", "convolution", "add", "concat"):
        return None
    if call.kind == "average_pool":
        # What is left of space says whether all of it was averaged: [batch, channels], or ones behind them.
        is_global = len(call.shape) == 2 or (len(call.shape) == 4 and tuple(call.shape[2:]) == (1, 1))
        return None if is_global else f"{what} averages codes over all of two dimensions only"
    return f"{call.type} has no integer kernel in {what}"


def check_static_format(kind: str, fmt: Format, call: Call, what: str) -> None:
    """Raise TargetError, with what to use instead, where XNNPACK's integer kernels do not take a format."""
    float32_scale = fmt.scale is not None and fmt.scale.grid == NativeGrid(torch.float32)
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


def check_sums(integer_model: nn.Module, what: str) -> None:
    """Raise TargetError where an addition has steps too far apart for XNNPACK's fixed point."""
    for path, module in integer_model.named_modules():
        if isinstance(module, IntegerAdd):
            for name in module.names:
                ratio = float(module.grid(name)[0] / module.grid("output")[0])
                if not RATIOS[0] <= ratio < RATIOS[1]:
                    site = path.replace("operations.sites.", "")
                    raise TargetError(
                        f"{site!r}: {what} adds codes whose step is {RATIOS[0]:.2g} to {RATIOS[1]:.0f} times the "
                        f"output's, and that of its {name} is {ratio:.3g} times. Keep it in float by a rule."
                    )
