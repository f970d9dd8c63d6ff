"""Elementwise functions of one tensor: which calls of torch they are, and what they are on codes of eight bits.

A function from one grid of at most 256 values to another is a table of 256 codes. The table is the function as far as
deployment is concerned, so it is also what training computes: torch's own kernels give one value different last bits at
different places of a tensor, and a runtime's kernels others again, but a table has one entry for each code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from isogrid.errors import PlanError
from isogrid.layers import arithmetic

Function = Callable[..., Tensor]

QUICK_GELU = 1.702
"""The factor in CLIP's approximation of GELU."""

RANDOM = frozenset({"rrelu"})
"""Functions that draw numbers in training."""


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Attributes:
        function: of x and the parameters, without side effects.
        calls: the torch functions that compute it.
        parameters: their names and defaults, in the order of the calls; None where there is no default.
    """

    function: Function
    calls: tuple[Any, ...]
    parameters: Mapping[str, float | None] = field(default_factory=dict)


class Applied(NamedTuple):
    """A function with all that a call of it says.

    Attributes:
        name: a key of `ACTIVATIONS`.
        parameters: numbers, rounded to float32.
        slopes: the parameter of PReLU, [1] or [channels], else None.
    """

    name: str
    parameters: tuple[float, ...] = ()
    slopes: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The function's values, in x's dtype."""
        function = ACTIVATIONS[self.name].function
        return function(x, *self.parameters) if self.slopes is None else function(x, self.slopes.to(x.dtype))

    def on_table(self, x: Tensor) -> Tensor:
        """The values for a table of inputs, [256] or [channels, 256]."""
        return self(x) if x.dim() == 1 else self(x.t()).t()




def _rrelu(x: Tensor, lower: float, upper: float) -> Tensor:
    return F.leaky_relu(x, (lower + upper) / 2)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 * x)`, as CLIP has it, in one call that a function mode sees."""
    if has_torch_function_unary(x):
        return handle_torch_function(quick_gelu, (x,), x)
    return x * torch.sigmoid(QUICK_GELU * x)


_T = Tensor

ACTIVATIONS: dict[str, Activation] = {
    "abs": Activation(torch.abs, (torch.abs, torch.abs_, torch.absolute, _T.abs, _T.abs_, _T.absolute, _T.__abs__)),
    "celu": Activation(F.celu, (F.celu, torch.celu, torch.celu_), {"alpha": 1.0}),
    "cos": Activation(torch.cos, (torch.cos, torch.cos_, _T.cos, _T.cos_)),
    "elu": Activation(F.elu, (F.elu, F.elu_), {"alpha": 1.0}),
    "erf": Activation(torch.erf, (torch.erf, torch.erf_, _T.erf, _T.erf_, torch.special.erf)),
    "exp": Activation(torch.exp, (torch.exp, torch.exp_, _T.exp, _T.exp_)),
    "gelu": Activation(F.gelu, (F.gelu,)),
    "gelu_tanh": Activation(_gelu_tanh, ()),
    "hardshrink": Activation(F.hardshrink, (F.hardshrink, torch.hardshrink, _T.hardshrink), {"lambd": 0.5}),
    "hardsigmoid": Activation(F.hardsigmoid, (F.hardsigmoid,)),
    "hardswish": Activation(F.hardswish, (F.hardswish,)),
    "leaky_relu": Activation(F.leaky_relu, (F.leaky_relu, F.leaky_relu_), {"negative_slope": 0.01}),
    "logsigmoid": Activation(F.logsigmoid, (F.logsigmoid,)),
    "mish": Activation(F.mish, (F.mish,)),
    "neg": Activation(torch.neg, (torch.neg, torch.neg_, torch.negative, _T.neg, _T.neg_, _T.negative, _T.__neg__)),
    "prelu": Activation(F.prelu, (F.prelu, torch.prelu, _T.prelu)),
    "quick_gelu": Activation(quick_gelu, (quick_gelu,)),
    "rrelu": Activation(_rrelu, (F.rrelu, torch.rrelu, torch.rrelu_), {"lower": 1 / 8, "upper": 1 / 3}),
    "selu": Activation(F.selu, (F.selu, torch.selu, torch.selu_)),
    "sigmoid": Activation(torch.sigmoid, (torch.sigmoid, torch.sigmoid_, _T.sigmoid, _T.sigmoid_, torch.special.expit)),
    "silu": Activation(F.silu, (F.silu,)),
    "sin": Activation(torch.sin, (torch.sin, torch.sin_, _T.sin, _T.sin_)),
    "softplus": Activation(F.softplus, (F.softplus,), {"beta": 1.0, "threshold": 20.0}),
    "softshrink": Activation(F.softshrink, (F.softshrink,), {"lambd": 0.5}),
    "softsign": Activation(F.softsign, (F.softsign,)),
    "square": Activation(torch.square, (torch.square, torch.square_, _T.square, _T.square_)),
    "tanh": Activation(torch.tanh, (torch.tanh, torch.tanh_, _T.tanh, _T.tanh_)),
    "tanhshrink": Activation(F.tanhshrink, (F.tanhshrink,)),
    "threshold": Activation(
        F.threshold, (F.threshold, torch.threshold, torch.threshold_), {"threshold": None, "value": None}
    ),
}
"""The functions by name. Those that are infinite or infinitely steep at zero, a value of every grid, are not here."""

NAMES: dict[Any, str] = {call: name for name, activation in ACTIVATIONS.items() for call in activation.calls}
"""The name of each torch function."""

WRITING = frozenset(call for call in NAMES if call.__name__.endswith("_") and not call.__name__.endswith("__"))
"""Those that write their result into their argument."""


def applied(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Applied:
    """What a call of a torch function is.

    Args:
        function: a key of `NAMES`.
        args, kwargs: what follows the tensor.

    Raises:
        PlanError: a parameter is no number, so that there is no one table.

    >>> applied(F.elu, (2.0, True), {})
    Applied(name='elu', parameters=(2.0,), slopes=None)
    >>> applied(F.gelu, (), {"approximate": "tanh"}).name
    'gelu_tanh'
    """
    name = NAMES[function]
    if name == "prelu":
        return Applied(name, (), kwargs.get("weight", args[0] if args else None))
    if name == "gelu" and "tanh" in (*args, kwargs.get("approximate")):
        return Applied("gelu_tanh")
    parameters = []
    for position, (key, default) in enumerate(ACTIVATIONS[name].parameters.items()):
        value = kwargs.get(key, args[position] if position < len(args) else default)
        if not isinstance(value, int | float):
            raise PlanError(f"{name} whose {key} is a {type(value).__name__} and no number")
        parameters.append(float(torch.tensor(float(value), dtype=torch.float32)))
    return Applied(name, tuple(parameters))


def draws(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers: RReLU in training."""
    return NAMES[function] in RANDOM and bool(kwargs.get("training", args[2] if len(args) > 2 else False))


def lookup_table(
    function: Applied, x_scale: Tensor, x_zero_point: Tensor, y_scale: Tensor, y_zero_point: Tensor, low: int, high: int
) -> Tensor:
    """The codes of a function's values, for every code of x.

    The function is evaluated in float64 and rounded to float32, so that its last bits do not depend on the machine:

        table[code] = clamp(rint(f32(f32(f(f32((code - x_zero_point) * x_scale))) / y_scale)) + y_zero_point, low, high)

    Where the function has no value, the table has the code of zero.

    Args:
        function: with its parameters.
        x_scale, x_zero_point, y_scale, y_zero_point: the grids, one element each; zero points have the codes' dtype.
        low, high: the codes of the output in use.

    Returns:
        codes [256] or, for slopes by channel, [channels, 256]; at each byte the entry of the code with these bits.
    """
    y = exact_values(function, table_of_inputs(function, x_scale, x_zero_point)).to(torch.float32)
    return arithmetic.quantize(y.nan_to_num(nan=0.0), y_scale, y_zero_point, low, high)


def table_of_inputs(function: Applied, scale: Tensor, zero_point: Tensor) -> Tensor:
    """What each byte stands for as a code, float32 [256], or [channels, 256] for slopes by channel."""
    codes = torch.arange(256, device=scale.device).to(torch.uint8).view(zero_point.dtype)
    x = arithmetic.dequantize(codes, scale, zero_point)
    channels = 1 if function.slopes is None else function.slopes.numel()
    return x if channels == 1 else x.repeat(channels, 1)


def exact_values(function: Applied, x: Tensor) -> Tensor:
    """The values for a table of inputs, float64."""
    if function.slopes is not None:
        function = function._replace(slopes=function.slopes.detach().to(torch.float32).reshape(-1))
    return function.on_table(x.detach().to(torch.float64))


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """The entries of a table [256] for codes [...], or of one [channels, 256] for codes [batch, channels, ...].

    >>> look_up(torch.tensor([1, 255], dtype=torch.uint8), torch.arange(256))
    tensor([  1, 255])
    """
    return table.reshape(-1).index_select(0, places(codes, table)).reshape(codes.shape)


def places(codes: Tensor, table: Tensor) -> Tensor:
    """Where the entries for codes lie in a table, flat: int32 [elements]."""
    index = codes.view(torch.uint8).to(torch.int32)
    if table.dim() == 2:
        offsets = torch.arange(len(table), dtype=torch.int32, device=codes.device) * 256
        index = index + offsets.reshape(-1, *[1] * (codes.dim() - 2))
    return index.reshape(-1)
