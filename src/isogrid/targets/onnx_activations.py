"""Elementwise functions of codes in ONNX: float operators where these give the same codes, tables elsewhere.

The exporter writes one node of our own for each function. Once the file is whole and the grids are known, the node
becomes the float operator between DequantizeLinear and QuantizeLinear, if all 256 values keep so far away from ties
that no float operator within its known error can change a code. Otherwise, and for functions whose operators are slow,
it becomes a look-up in the table itself. ONNX Runtime's GatherElements does that eight times as fast as its Gather, but
unlike a float operator it makes networks of convolutions move their channels to the front and back again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import values
from torch import Tensor

from isogrid.layers.activations import QUICK_GELU, Applied, exact_values, table_of_inputs
from isogrid.layers.arithmetic import quantize
from isogrid.layers.kernels import KERNELS
from isogrid.targets.onnx_nodes import initializer, input_of, insert, unique, values_of

DOMAIN = "isogrid"
LOOK_UP = "GatherElements"
"""The operator that looks a code up."""

def _schema() -> OpSchema:
    """What the exporter has to know about our node in order to write one."""
    parameter, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    kind = OpSchema.AttrType
    attributes = {"function": kind.STRING, "parameters": kind.FLOATS, "low": kind.INT, "high": kind.INT}
    return OpSchema(
        "Activation",
        DOMAIN,
        1,
        inputs=[
            parameter("x", "T"),
            parameter("x_scale", "S"),
            parameter("x_zero_point", "T"),
            parameter("y_scale", "S"),
            parameter("y_zero_point", "T"),
            parameter("slopes", "S", param_option=optional),
        ],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", ["tensor(uint8)", "tensor(int8)"], ""), ("S", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(name, type_) for name, type_ in {**attributes, "kernels": kind.STRING}.items()],
    )


ACTIVATION = values.Op(values.Opset(DOMAIN, 1), "Activation", _schema())


class _Site(NamedTuple):
    """A node of ours, read.

    Attributes:
        function: with its parameters.
        x, y: scale and zero point.
        low, high: the codes in use.
        kernels: how the runtime computes.
    """

    function: Applied
    x: tuple[Tensor, Tensor]
    y: tuple[Tensor, Tensor]
    low: int
    high: int
    kernels: str

    @property
    def table(self) -> Tensor:
        """The codes, by the bytes of the codes of x."""
        return KERNELS[self.kernels].table(self.function, *self.x, *self.y, self.low, self.high)

    @property
    def allows_float(self) -> bool:
        """Whether the float operator gives the table's codes for every code."""
        form = FLOAT_FORMS.get(self.function.name)
        if form is None:
            return False
        x = table_of_inputs(self.function, *self.x)
        y = exact_values(self.function, x)
        reach = form.error * torch.maximum(x.abs(), y.abs()).clamp(min=1.0)
        least, most = (quantize((y + side).float(), *self.y, self.low, self.high) for side in (-reach, reach))
        return torch.equal(least, most) and torch.equal(least, self.table)


def write_activations(model: ir.Model) -> None:
    """Replace every node of ours; the codes that come out are named after the site."""
    taken = {value.name for value in values_of(model.graph)}
    for node in list(model.graph):
        if node.domain == DOMAIN:
            _Writer(node, taken, model.graph).write()
    model.opset_imports.pop(DOMAIN, None)


def name_looked_up(graph: ir.Graph) -> None:
    """Name codes from a table after their site again, where the optimiser joined the Reshape with one behind it."""
    for node in graph:
        name = node.outputs[0].name or ""
        if node.op_type == LOOK_UP and name.endswith("_flat"):
            shaped = node.outputs[0].consumers()[0].outputs[0]
            if not shaped.is_graph_output():
                shaped.name = name.removesuffix("_flat")


class _Writer:
    """Writes what a node of ours becomes."""

    def __init__(self, node: ir.Node, taken: set[str | None], graph: ir.Graph):
        self.node, self.graph = node, graph
        self.codes, self.site = input_of(node, 0), _read(node)
        self.name = unique((input_of(node, 3).name or "").removesuffix("_scale").removesuffix(".scale"), taken)

    def write(self) -> None:
        """Replace the node."""
        result = self.node.outputs[0]
        found = self._float_operator() if self.site.allows_float else self._look_up()
        found.type, found.shape = result.type, result.shape
        result.replace_all_uses_with(found, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        if not found.is_graph_output():
            found.name = self.name

    def _look_up(self) -> ir.Value:
        table = self.site.table
        index = self.add("Cast", [self.codes], "index", to=ir.DataType.INT32)
        if table.dim() == 2:
            offsets = self._by_channel(np.arange(len(table), dtype=np.int32) * 256)
            index = self.add("Add", [index, self._constant(offsets, "offsets")], "shifted")
        flat = self.add("Reshape", [index, self._constant(np.array([-1]), "length")], "flat_index")
        entries = self._constant(table.reshape(-1).numpy(), "table")
        found = self.add(LOOK_UP, [entries, flat], "flat", axis=0)
        return self.add("Reshape", [found, self._lengths()], "looked_up")

    def _float_operator(self) -> ir.Value:
        x = self.add("DequantizeLinear", [self.codes, input_of(self.node, 1), input_of(self.node, 2)], "input")
        y = FLOAT_FORMS[self.site.function.name].write(self, x, *self.site.function.parameters)
        zero_point = input_of(self.node, 4)
        codes = self.add("QuantizeLinear", [y, input_of(self.node, 3), zero_point], "quantized")
        limits = torch.iinfo(self.site.y[1].dtype)
        if self.site.low <= limits.min and self.site.high >= limits.max:
            return codes
        dtype = ir.DataType.UINT8 if limits.min == 0 else ir.DataType.INT8
        bounds = [
            initializer(ir.tensor(bound, dtype=dtype, name=f"{self.name}_{part}"), self.graph)
            for part, bound in (("low", self.site.low), ("high", self.site.high))
        ]
        return self.add("Clip", [codes, *bounds], "clipped")

    def silu(self, x: ir.Value) -> ir.Value:
        """x times its sigmoid."""
        return self.add("Mul", [x, self.add("Sigmoid", [x], "sigmoid")], "float")

    def quick_gelu(self, x: ir.Value) -> ir.Value:
        """x times the sigmoid of a multiple of x."""
        inner = self.add("Mul", [x, self._constant(np.array(QUICK_GELU, dtype=np.float32), "factor")], "multiple")
        return self.add("Mul", [x, self.add("Sigmoid", [inner], "sigmoid")], "float")

    def prelu(self, x: ir.Value) -> ir.Value:
        """Slopes have the dimensions that let them broadcast."""
        slopes = self.site.function.slopes
        assert slopes is not None
        own = slopes.numpy().reshape(-1)
        own = own if len(own) == 1 else self._by_channel(own)
        return self.add("PRelu", [x, self._constant(own, "slopes")], "float")

    def _by_channel(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        assert self.codes.shape is not None
        return array.reshape(-1, *[1] * (len(self.codes.shape) - 2))

    def _lengths(self) -> ir.Value:
        lengths = None if self.codes.shape is None else [n if isinstance(n, int) else -1 for n in self.codes.shape]
        if lengths is not None and lengths.count(-1) <= 1:
            return self._constant(np.array(lengths, dtype=np.int64), "shape")
        return self.add("Shape", [self.codes], "shape")

    def add(self, op_type: str, inputs: list[ir.Value], part: str, **attributes: Any) -> ir.Value:
        """The output of a new node."""
        return insert(self.graph, self.node, op_type, inputs, attributes, f"{self.name}_{part}")

    def _constant(self, array: np.ndarray[Any, Any], part: str) -> ir.Value:
        return initializer(ir.tensor(array, name=f"{self.name}_{part}"), self.graph)


class _FloatForm(NamedTuple):
    """A quick float operator.

    Attributes:
        error: how far from the exact value it may be, in units of the largest of 1, |x| and |y|. 1e-6 is three times
            what was measured in ONNX Runtime 1.31; nothing for one multiplication, which is rounded alike everywhere.
        write: writes it.
    """

    error: float
    write: Callable[..., ir.Value]


def _operator(op_type: str, parameter: str | None = None, **attributes: Any) -> Callable[..., ir.Value]:
    """One ONNX operator, one of whose attributes may be the function's parameter."""

    def write(writer: _Writer, x: ir.Value, *parameters: float) -> ir.Value:
        own = {} if parameter is None else {parameter: parameters[0]}
        return writer.add(op_type, [x], "float", **attributes, **own)

    return write


FLOAT_FORMS = {
    "abs": _FloatForm(0.0, _operator("Abs")),
    "elu": _FloatForm(1e-6, _operator("Elu", "alpha")),
    "exp": _FloatForm(1e-6, _operator("Exp")),
    "gelu": _FloatForm(1e-6, _operator("Gelu")),
    "gelu_tanh": _FloatForm(1e-6, _operator("Gelu", approximate="tanh")),
    "hardsigmoid": _FloatForm(1e-6, _operator("HardSigmoid", alpha=1 / 6, beta=0.5)),
    "hardswish": _FloatForm(1e-6, _operator("HardSwish")),
    "leaky_relu": _FloatForm(0.0, _operator("LeakyRelu", "alpha")),
    "neg": _FloatForm(0.0, _operator("Neg")),
    "prelu": _FloatForm(0.0, _Writer.prelu),
    "quick_gelu": _FloatForm(1e-6, _Writer.quick_gelu),
    "sigmoid": _FloatForm(1e-6, _operator("Sigmoid")),
    "silu": _FloatForm(1e-6, _Writer.silu),
    "tanh": _FloatForm(1e-6, _operator("Tanh")),
}
"""The functions that ONNX Runtime computes in float at least as fast as it looks codes up."""


def _read(node: ir.Node) -> _Site:
    x_scale, x_zero_point, y_scale, y_zero_point, *rest = (_tensor(value) for value in node.inputs[1:])
    attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
    slopes = rest[0] if rest else None
    function = Applied(attributes["function"], tuple(attributes.get("parameters", ())), slopes)
    limits = (attributes["low"], attributes["high"])
    return _Site(function, (x_scale, x_zero_point), (y_scale, y_zero_point), *limits, attributes["kernels"])


def _tensor(value: ir.Value | None) -> Tensor:
    assert value is not None
    constant = ir.convenience.get_const_tensor(value)
    assert constant is not None
    return torch.from_numpy(constant.numpy().copy())
