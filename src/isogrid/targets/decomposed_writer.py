"""Rewrites a `torch.fx` graph into `quantized_decomposed` operators, which `decomposed_operators` knows one by one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from isogrid.errors import TargetError

aten: Any = torch.ops.aten
decomposed: Any = torch.ops.quantized_decomposed
QUANTIZE = decomposed.quantize_per_tensor.default
PER_TOKEN = decomposed.dequantize_per_token.default

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

VIEWS = (aten.view.default, aten._unsafe_view.default)

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


class DecomposedWriter:
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

    def run(self, writers: Mapping[Any, Callable[..., fx.Node]]) -> None:
        """Replace every operator of Isogrid; then let values that were moved lie on their grid in the graph too.

        Args:
            writers: how each operator is written.
        """
        for node in list(self.graph.nodes):
            if node.op == "call_function" and getattr(node.target, "namespace", "") == "isogrid":
                write = writers.get(node.target)
                if write is None:
                    raise TargetError(f"{node.target} has no form in quantized_decomposed operators. Keep it float.")
                with self.graph.inserting_before(node):
                    new = write(self, *node.args)
                new.meta.setdefault("val", node.meta["val"])
                node.replace_all_uses_with(new)
                self.graph.erase_node(node)
            elif node.op == "call_function" and node.target in COPYING:
                for user in node.users:
                    if user.target in VIEWS:  # of what the copy had laid out anew
                        user.target = aten.reshape.default
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
