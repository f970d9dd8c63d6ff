"""From a converted model to a `torch.export` program of `quantized_decomposed` operators.

Each operator of Isogrid becomes the float operator of torch between `dequantize_per_tensor` and `quantize_per_tensor`,
with the numbers of its grids written into the graph: the form that PyTorch's own quantisation produces, and that
ExecuTorch, LiteRT's converter and Inductor look for. Their kernels compute it in integers. Read as it stands, by torch
itself, it is float arithmetic, which now and then rounds a value near a tie the other way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from isogrid.errors import TargetError
from isogrid.targets.dynamic_decomposed import dynamic_form
from isogrid.targets.standing_in import standing_in

isogrid: Any = torch.ops.isogrid
aten: Any = torch.ops.aten
decomposed: Any = torch.ops.quantized_decomposed
QUANTIZE = decomposed.quantize_per_tensor.default

PER_TOKEN = decomposed.dequantize_per_token.default
INVERT = aten.bitwise_not.default

ACTIVATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "leaky_relu": (aten.leaky_relu.default, {}),
}
"""Functions that a runtime has between codes."""

SLOPES = (2.0**-8, 2.0**7)
"""XNNPACK's leaky ReLU has slopes between these, in output steps per input step."""

MOVING = frozenset(
    {
        aten.cat.default,
        aten.max_pool2d.default,
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)
"""Operators whose output lies on their input's grid, and which runtimes have for codes."""

COPYING = {aten.clone.default: 0, aten.copy.default: 1, aten.dropout.default: 0, aten.alias.default: 0}
"""Operators that return one of their arguments in a functional graph, and which."""


class Grid(NamedTuple):
    """A per-tensor grid in numbers: `scale * (code - zero_point)`, codes from low to high."""

    scale: float
    zero_point: int
    dtype: torch.dtype

    @property
    def arguments(self) -> tuple[float, int, int, int, torch.dtype]:
        """As the operators of torch take them after the tensor."""
        limits = torch.iinfo(self.dtype)
        return self.scale, self.zero_point, limits.min, limits.max, self.dtype

    def value(self, code: int) -> float:
        """What a code stands for."""
        return (code - self.zero_point) * self.scale


class Decomposed(NamedTuple):
    """A decomposed model.

    Attributes:
        program: takes and returns what the model does.
        observing: the same with every quantised tensor as a further output, all outputs in one flat tuple.
        codes: for each quantised tensor by its name, which of the further outputs it is.
        layers: names of the linear layers and convolutions, in order.
        grids: of each of the further outputs.
        quantizations: for each quantised tensor by its name, which of the program's quantisations makes it, in order.
        packed: for each linear layer with float input and output, which of the further outputs these two are.
    """

    program: torch.export.ExportedProgram
    observing: torch.export.ExportedProgram
    codes: dict[str, int]
    layers: list[str]
    grids: list[Grid]
    quantizations: dict[str, int]
    packed: dict[str, tuple[int, int]]


def decompose(
    integer_model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None, stored_as: str = "codes"
) -> Decomposed:
    """Export a converted model and replace Isogrid's operators by those of torch.

    Args:
        integer_model: of `isogrid.convert`.
        example_inputs: positional arguments of its forward.
        dynamic_shapes: as for torch.export.export.
        stored_as: "codes" has int8 weights, and codes as the further outputs; "values" has float weights that the graph
            quantises, and dequantised codes, for readers that make the codes themselves.

    Raises:
        TargetError: torch.export cannot trace the model, or one of its operators has no such form.
    """
    # In the functional form there is no writing in place and no dropout.
    with standing_in(integer_model, dynamic_form):
        functional = _exported(integer_model, example_inputs, dynamic_shapes).run_decompositions({})
    module = functional.module(check_guards=False)
    writer = _Writer(module, stored_as)
    writer.run()
    program = _exported(module, example_inputs, dynamic_shapes)
    outputs = next(node for node in module.graph.nodes if node.op == "output")
    flat = [node for node in pytree.tree_leaves(outputs.args[0]) if isinstance(node, fx.Node)]
    made = list(dict.fromkeys(writer.codes.values()))
    with module.graph.inserting_before(outputs):
        seen = [writer.values(node, writer.grid_of(node)) for node in made] if stored_as == "values" else made
    ends = list(dict.fromkeys(node for pair in writer.packed.values() for node in pair))
    outputs.args = ((*flat, *seen, *ends),)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.recompile()
    leaves = tuple(pytree.tree_leaves(example_inputs))
    shapes = None if dynamic_shapes is None else tuple(pytree.tree_leaves(dynamic_shapes))
    observing = _exported(module, leaves, shapes)
    position = {node: number for number, node in enumerate(made)}
    codes = {name: position[node] for name, node in writer.codes.items()}
    order = {node: number for number, node in enumerate(n for n in module.graph.nodes if n.target is QUANTIZE)}
    return Decomposed(
        program,
        observing,
        codes,
        writer.layers,
        [writer.grid_of(node) for node in made],
        {name: order[node] for name, node in writer.codes.items()},
        {name: (len(seen) + ends.index(x), len(seen) + ends.index(y)) for name, (x, y) in writer.packed.items()},
    )


def _exported(module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes)
    except Exception as error:  # what torch.export raises shares no base class
        raise TargetError(
            f"torch.export cannot trace the model: {type(error).__name__}: {error}. It needs a forward whose Python "
            "does not depend on the data."
        ) from error


class _Writer:
    """Rewrites a graph in place.

    Attributes:
        codes: the node of each quantised tensor, by name.
        layers: names of what multiplies, in order.
        packed: input and output of each linear layer that quantises its input itself, by its name.
    """

    def __init__(self, module: fx.GraphModule, stored_as: str):
        self.module, self.graph, self.stored_as = module, module.graph, stored_as
        self.codes: dict[str, fx.Node] = {}
        self.layers: list[str] = []
        self.packed: dict[str, tuple[fx.Node, fx.Node]] = {}
        self._grids: dict[fx.Node, Grid] = {}
        self._made: dict[tuple[fx.Node, Grid], fx.Node] = {}
        self._names: dict[str, int] = {}

    def run(self) -> None:
        """Replace every operator of Isogrid; then let values that were moved lie on their grid in the graph too."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and getattr(node.target, "namespace", "") == "isogrid":
                write = WRITERS.get(node.target)
                if write is None:
                    raise TargetError(f"{node.target} has no form in quantized_decomposed operators. Keep it float.")
                with self.graph.inserting_before(node):
                    new = write(self, *node.args)
                new.meta.setdefault("val", node.meta["val"])
                node.replace_all_uses_with(new)
                self.graph.erase_node(node)
            elif node.op == "call_function" and node.target in COPYING:
                node.replace_all_uses_with(node.args[COPYING[node.target]])
                self.graph.erase_node(node)
            elif node.op == "call_function" and node.target in MOVING:
                self._keep_on_grid(node)
            elif node.target is aten.linear.default and node.args[0].target is PER_TOKEN:
                name = self.name(str(node.args[1].args[0].target).removesuffix(".weight"))
                self.layers.append(name)
                self.packed[name] = node.args[0].args[0].args[0], node
        self._one_reader_each()
        self.graph.eliminate_dead_code()
        self.codes = {name: node for name, node in self.codes.items() if node.graph is self.graph and node.users}
        self._drop_unused_tensors()
        self.graph.lint()
        self.module.recompile()

    def call(self, function: Any, *args: Any) -> fx.Node:
        """A call in the graph."""
        return self.graph.call_function(function, args)

    def constant(self, node: Any) -> Tensor:
        """The value of a parameter or buffer."""
        value: Any = self.module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        assert isinstance(value, Tensor)
        return value

    def grid(self, scale: Any, zero_point: Any) -> Grid:
        """A grid in numbers."""
        point = self.constant(zero_point)
        return Grid(float(self.constant(scale)), int(point), point.dtype)

    def name(self, name: str) -> str:
        """What the codes on a grid `fc.output`, or a layer, are called: `fc.output`, and `fc.output_2` next time."""
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"

    def grid_of(self, codes: fx.Node) -> Grid:
        """The grid that codes were made on."""
        return self._grids[codes]

    def keep(self, codes: fx.Node, scale: Any) -> fx.Node:
        """The same codes, after their name has been written down."""
        self.codes[self.name(str(scale.target).removesuffix("_scale"))] = codes
        return codes

    def quantize(self, x: fx.Node, grid: Grid) -> fx.Node:
        """Codes of values; those that were codes on this grid a moment ago, and those that were made before."""
        codes: Any = x.args[0] if x.target is decomposed.dequantize_per_tensor.default else None
        if self._grids.get(codes) == grid:
            return codes  # type: ignore[no-any-return]
        if (x, grid) not in self._made:
            codes = self._made[x, grid] = self.call(QUANTIZE, x, *grid.arguments)
            self._grids[codes] = grid
        return self._made[x, grid]

    def values(self, codes: fx.Node, grid: Grid) -> fx.Node:
        """Values of codes."""
        return self.call(decomposed.dequantize_per_tensor.default, codes, *grid.arguments)

    def clamped(self, y: fx.Node, grid: Grid, low: int, high: int) -> fx.Node:
        """Values within the codes in use."""
        limits = torch.iinfo(grid.dtype)
        if low <= limits.min and high >= limits.max:
            return y
        if low == grid.zero_point and high >= limits.max:
            return self.call(aten.relu.default, y)
        return self.call(aten.hardtanh.default, y, grid.value(low), grid.value(high))

    def finish(self, y: fx.Node, scale: Any, zero_point: Any, low: int, high: int, fuses: bool) -> fx.Node:
        """From a float operator to codes.

        Args:
            y: its output.
            scale, zero_point, low, high: of the codes.
            fuses: whether runtimes have the operator and a clamp in one kernel.
        """
        grid = self.grid(scale, zero_point)
        if not fuses and self.clamped(y, grid, low, high) is not y:
            y = self.values(self.quantize(y, grid), grid)
        codes = self.quantize(self.clamped(y, grid, low, high), grid)
        return self.keep(codes, scale)

    def operands(
        self, x: fx.Node, x_scale: Any, x_zero_point: Any, weight: Any, weight_scale: Any, bias: Any
    ) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """Values of a layer's input, weight and bias."""
        self.layers.append(self.name(str(weight.target).removesuffix(".weight")))
        x_values = self.values(x, self.grid(x_scale, x_zero_point))
        channels = self.constant(weight).shape[0]
        scales = self.constant(weight_scale).reshape(-1).expand(channels).contiguous()
        prefix = self._free(f"{weight.target}".replace(".", "_"))
        per_channel = (
            self._buffer(f"{prefix}_scales", scales),
            self._buffer(f"{prefix}_zero_points", torch.zeros(channels, dtype=torch.int64)),
            0,
            -128,
            127,
            torch.int8,
        )
        codes = weight
        if self.stored_as == "values":
            wide = self.constant(weight).float() * scales.reshape(-1, *[1] * (self.constant(weight).dim() - 1))
            codes = self.call(
                decomposed.quantize_per_channel.default, self._buffer(f"{prefix}_values", wide), *per_channel
            )
        weight_values = self.call(decomposed.dequantize_per_channel.default, codes, *per_channel)
        if bias is None:
            return x_values, weight_values, None
        shift = self.constant(bias).float() * (self.constant(x_scale) * scales)
        return x_values, weight_values, self._buffer(f"{prefix}_shift", shift)

    def _free(self, name: str) -> str:
        while any(hasattr(self.module, f"{name}_{part}") for part in ("scales", "values", "shift")):
            name += "_"
        return name

    def _buffer(self, name: str, value: Tensor) -> fx.Node:
        self.module.register_buffer(name, value)
        return self.graph.get_attr(name)

    def _keep_on_grid(self, node: fx.Node) -> None:
        """Put quantisation behind an operator that only moves values of one grid."""
        sources = pytree.tree_leaves(node.args[0])
        grids = {
            self._grids.get(source.args[0]) if source.target is decomposed.dequantize_per_tensor.default else None
            for source in sources
        }
        grid = grids.pop()
        if grids or grid is None:
            return
        users = list(node.users)
        with self.graph.inserting_after(node):
            codes = self.call(QUANTIZE, node, *grid.arguments)
        self._grids[codes] = grid
        self._made[node, grid] = codes
        with self.graph.inserting_after(codes):
            values = self.values(codes, grid)
        for user in users:
            user.replace_input_with(node, values)

    def _drop_unused_tensors(self) -> None:
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        for module_path, module in self.module.named_modules():
            for name in [*module._buffers, *module._parameters]:
                if f"{module_path}.{name}".lstrip(".") not in used:
                    delattr(module, name)

    def _one_reader_each(self) -> None:
        """Dequantise anew for each reader: what a runtime replaces by a kernel is a pattern with edges of its own."""
        for node in list(self.graph.nodes):
            if node.target is decomposed.dequantize_per_tensor.default:
                for user in list(node.users)[1:]:
                    with self.graph.inserting_before(user):
                        user.replace_input_with(node, self.call(node.target, *node.args))


def _quantize(writer: _Writer, x: fx.Node, scale: Any, zero_point: Any, low: int, high: int, *_: Any) -> fx.Node:
    grid = writer.grid(scale, zero_point)
    return writer.keep(writer.quantize(writer.clamped(x, grid, low, high), grid), scale)


def _dequantize(writer: _Writer, codes: fx.Node, scale: Any, zero_point: Any) -> fx.Node:
    return writer.values(codes, writer.grid(scale, zero_point))


def _linear(writer: _Writer, *args: Any) -> fx.Node:
    *operands, y_scale, y_zero_point, low, high = args
    y = writer.call(aten.linear.default, *writer.operands(*operands))
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=True)


def _linear_float(writer: _Writer, *args: Any) -> fx.Node:
    return writer.call(aten.linear.default, *writer.operands(*args))


def _convolution(writer: _Writer, *args: Any) -> fx.Node:
    *operands, y_scale, y_zero_point, stride, padding, dilation, groups, low, high = args
    rank = len(stride)
    if len(padding) != rank:
        raise TargetError("A convolution with unequal padding has no counterpart in torch.")
    function = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[rank - 1]
    y = writer.call(function, *writer.operands(*operands), stride, padding, dilation, groups)
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=True)


def _of_two(function: Any) -> Callable[..., fx.Node]:
    def write(writer: _Writer, *args: Any) -> fx.Node:
        *operands, y_scale, y_zero_point, low, high, _ = args
        a, b = operands[:3], operands[3:]
        operator = function
        # A difference comes as a sum with inverted codes: `~code - ~zero_point == zero_point - code`.
        if INVERT in (a[0].target, b[0].target):
            if a[0].target is INVERT:
                a, b = b, a
            b, operator = [b[0].args[0], b[1], b[2].args[0]], aten.sub.Tensor
        if any(scale.op != "get_attr" for scale in (a[1], b[1])):
            raise TargetError("A sum with a number or with alpha has no integer kernel. Keep it in float by a rule.")
        first, second = (writer.values(codes, writer.grid(*own)) for codes, *own in (a, b))
        return writer.finish(writer.call(operator, first, second), y_scale, y_zero_point, low, high, fuses=False)

    return write


def _activation(writer: _Writer, *args: Any) -> fx.Node:
    x, x_scale, x_zero_point, slopes, y_scale, y_zero_point, name, parameters, low, high, _ = args
    if name not in ACTIVATIONS or slopes is not None:
        raise TargetError(f"{name} has no form in quantized_decomposed operators. Keep it float.")
    values = writer.values(x, writer.grid(x_scale, x_zero_point))
    rise = float(writer.constant(x_scale) / writer.constant(y_scale))
    if name == "leaky_relu" and not all(SLOPES[0] <= abs(slope) <= SLOPES[1] for slope in (rise, rise * parameters[0])):
        raise TargetError(
            f"A leaky ReLU from steps of {float(writer.constant(x_scale)):.3g} to steps of "
            f"{float(writer.constant(y_scale)):.3g} is too flat or too steep for XNNPACK's 8 bits after the point. "
            "Keep it in float by a rule."
        )
    function, settings = ACTIVATIONS[name]
    y = writer.graph.call_function(function, (values, *parameters), settings)
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=False)


def _global_average_pool(writer: _Writer, *args: Any) -> fx.Node:
    x, x_scale, x_zero_point, y_scale, y_zero_point, low, high, _ = args
    values = writer.values(x, writer.grid(x_scale, x_zero_point))
    y = writer.call(aten.mean.dim, values, list(range(2, x.meta["val"].dim())), True)
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=False)


def _average_pool(writer: _Writer, *args: Any) -> fx.Node:
    x, x_scale, x_zero_point, y_scale, y_zero_point, kernel, stride, padding, ceil, include, low, high, _ = args
    function = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)[len(kernel) - 1]
    values = writer.values(x, writer.grid(x_scale, x_zero_point))
    y = writer.call(function, values, kernel, stride, padding, ceil, include)
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=False)


def _concatenate(writer: _Writer, *args: Any) -> fx.Node:
    parts, scales, zero_points, y_scale, y_zero_point, axis, low, high = args
    values = [writer.values(part, writer.grid(*own)) for part, *own in zip(parts, scales, zero_points, strict=True)]
    y = writer.call(aten.cat.default, values, axis)
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=False)


WRITERS: dict[Any, Callable[..., fx.Node]] = {
    isogrid.quantize.default: _quantize,
    isogrid.dequantize.default: _dequantize,
    isogrid.static_linear.default: _linear,
    isogrid.static_linear_float.default: _linear_float,
    isogrid.static_convolution.default: _convolution,
    isogrid.static_add.default: _of_two(aten.add.Tensor),
    isogrid.static_multiply.default: _of_two(aten.mul.Tensor),
    isogrid.static_activation.default: _activation,
    isogrid.static_global_average_pool.default: _global_average_pool,
    isogrid.static_average_pool.default: _average_pool,
    isogrid.static_concatenate.default: _concatenate,
}
"""How each operator of Isogrid is written."""
