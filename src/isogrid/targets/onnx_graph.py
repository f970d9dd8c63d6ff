"""What happens to an exported graph before it is written: the same values with fewer nodes and fewer bytes."""

import ast
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript import optimizer

from isogrid.targets.onnx_activations import name_looked_up, write_activations
from isogrid.targets.onnx_nodes import initializer, input_of, insert, producer_of, unique, values_of

# Weight codes are stored in the smallest of these that holds them, each with the first opset that has it.
SUB_BYTE_TYPES = ((ir.DataType.INT2, ml_dtypes.int2, -2, 1, 25), (ir.DataType.INT4, ml_dtypes.int4, -8, 7, 21))
# Nodes that are named after the module they come from, so that a runtime's rewrite of one can be reported by its name.
NAMED_NODES = {"Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits"}
# Operators that ONNX Runtime replaces between DequantizeLinear and QuantizeLinear by kernels that round otherwise.
REPLACED = {"Add", "AveragePool", "Gemm", "GlobalAveragePool", "LeakyRelu", "Mul", "Resize", "Sigmoid", "Softmax"}
# Operators that it merges with a Pad before them.
POOLINGS = {"AveragePool", "MaxPool"}
# Operators that it moves a QuantizeLinear or DequantizeLinear across.
PASSED = {"Clip", "Flatten", "MaxPool", "Relu", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
MODULE_PATH = "pkg.torch.onnx.name_scopes"
ORIGIN = "pkg.torch.onnx.fx_node"
OURS = "isogrid.static_"
OUR_PRODUCT = f"{OURS}matmul"


Pass = Callable[[ir.Model], None]


def finish(model: ir.Model, passes: Sequence[Pass], modules: Collection[str]) -> onnx.ModelProto:
    """The file of an exported model, which computes the same bits.

    - The codes of each quantised tensor are named after their scale: those of `conv1.output_scale` are `conv1.output`.
      They are what QuantizeLinear makes, after the Clip that narrows it.
    - A QuantizeLinear that undoes the DequantizeLinear before it is removed, as is all that is computed twice.
    - Elementwise functions of codes become float operators, where these give the same codes, or tables.
    - A parameter that is added or multiplied, such as a position embedding, is stored as codes.
    - What its reader needs besides is done by the passes.
    - Nothing is stored that a reader can infer.

    Args:
        model: as `torch.onnx.export(..., optimize=False)` makes it; changed in place.
        passes: for its reader, such as `ONNX_RUNTIME_PASSES`.
        modules: paths of those that it was exported from.
    """
    _name_codes(model.graph)
    _remove_round_trips(model.graph)
    write_activations(model)
    optimizer.optimize_ir(model, should_fold=_should_fold)
    name_looked_up(model.graph)
    common.IdentityEliminationPass()(model)
    _make_scalars(model.graph)
    _store_codes(model)
    for change in passes:
        change(model)
    _strip(model, modules)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    model.ir_version = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return proto


def _should_fold(node: ir.Node) -> bool | None:
    """Rows of a table stay rows of the table, also where it is known which; of all else the optimiser decides."""
    table = node.inputs[0] if node.op_type == "Gather" else None
    is_table = table is not None and table.is_initializer() and table.dtype in (ir.DataType.INT8, ir.DataType.FLOAT)
    return False if is_table else None


def _name_codes(graph: ir.Graph) -> None:
    taken = {value.name for value in values_of(graph)}
    for node in graph:
        if node.op_type != "QuantizeLinear":
            continue
        codes = node.outputs[0]
        clip = codes.consumers()[0] if len(codes.consumers()) == 1 else None
        completed = clip.outputs[0] if clip is not None and clip.op_type == "Clip" else codes
        site = re.fullmatch(r"(.+)[._]scale", input_of(node, 1).name or "")
        if site is None or completed.is_graph_output():
            continue
        completed.name = unique(site[1], taken)
        if completed is not codes:
            codes.name = f"{completed.name}_unclipped"


def _remove_round_trips(graph: ir.Graph) -> None:
    """Codes that were dequantised and quantised again on the same grid are the same codes."""
    for node in graph:
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if before is None or node.outputs[0].is_graph_output():
            continue
        same = (before.op_type, node.op_type) == ("DequantizeLinear", "QuantizeLinear") and all(
            _same_constant(input_of(before, i), input_of(node, i)) for i in (1, 2)
        )
        if same:
            node.outputs[0].replace_all_uses_with(input_of(before, 0))
        elif (before.op_type, node.op_type) == ("Clip", "Clip") and _changes_nothing(before, node):
            node.outputs[0].replace_all_uses_with(before.outputs[0])


def _make_scalars(graph: ir.Graph) -> None:
    """A grid of the whole tensor has scalars: a list of one would be one grid a channel."""
    for node in graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for parameter in node.inputs[1:]:
            if parameter is not None and parameter.const_value is not None and parameter.const_value.size == 1:
                parameter.const_value = ir.tensor(parameter.const_value.numpy().reshape(()), name=parameter.name)
                parameter.shape = ir.Shape(())
                node.attributes.pop("axis", None)


def _store_codes(model: ir.Model) -> None:
    for node in list(model.graph):
        tensors = [None if value is None else value.const_value for value in node.inputs]
        if node.op_type != "QuantizeLinear" or any(tensor is None for tensor in tensors):
            continue
        x, scale, zero_point = (tensor.numpy() for tensor in tensors if tensor is not None)
        limits = np.iinfo(zero_point.dtype)
        codes = np.clip(np.rint(x / scale) + zero_point.astype(np.float32), limits.min, limits.max)
        y = node.outputs[0]
        stored = ir.tensor(codes.astype(zero_point.dtype), name=y.name)
        y.replace_all_uses_with(initializer(stored, model.graph))
        model.graph.remove(node, safe=True)
    for value in list(model.graph.initializers.values()):
        if value.name and not value.uses() and not value.is_graph_output():
            del model.graph.initializers[value.name]


def prepare_weights(model: ir.Model) -> None:
    """Weight codes of four bits or fewer are stored as INT4 or INT2, and cast to INT8 where they are used.

    ONNX Runtime folds the cast when it loads the model and then uses its 8-bit kernels. INT2 needs opset 25.
    """
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        weight = node.inputs[0] if node.op_type in ("DequantizeLinear", "Gather") else None
        if weight is not None and weight.const_value is not None and weight.const_value.dtype == ir.DataType.INT8:
            readers.setdefault(weight, []).append(node)
    for weight, nodes in readers.items():
        assert weight.const_value is not None
        codes = weight.const_value.numpy()
        dequantizers = [node for node in nodes if node.op_type == "DequantizeLinear"]  # the others look up in a table
        # Small weights stay int8 in ONNX Runtime and may be shared; see _copies.
        if not _pack(weight, codes, model):
            dequantizers += _copies(dequantizers, weight, codes.shape, model.graph)
        for dequantize in dequantizers:
            if any(consumer.op_type == "Gemm" for consumer in dequantize.outputs[0].consumers()):
                _give_zero_point(dequantize, model.graph)


def _pack(weight: ir.Value, codes: NDArray[np.int8], model: ir.Model) -> bool:
    for dtype, stored, low, high, opset in SUB_BYTE_TYPES:
        if codes.min() < low or codes.max() > high or model.opset_imports[""] < opset:
            continue
        weight.const_value = ir.tensor(codes.astype(stored), name=weight.name)
        weight.dtype = dtype
        cast = insert(model.graph, model.graph[0], "Cast", [weight], {"to": ir.DataType.INT8}, f"{weight.name}_int8")
        for user, index in weight.uses():
            if user is not cast.producer():
                user.replace_input_with(index, cast)
        return True
    return False


def _copies(
    dequantizers: Sequence[ir.Node], weight: ir.Value, sizes: tuple[int, ...], graph: ir.Graph
) -> list[ir.Node]:
    """A weight of its own for each further consumer of a shared one, at the cost of two nodes; returns the new ones.

    ONNX Runtime turns every int8 weight into uint8 where the processor wants it, and fails when it has done so
    already. It folds the Reshape when it loads the model, before that; copies of the same weight it would merge again,
    so that each is a copy of the last.
    """
    consumers = [(node, consumer) for node in dequantizers for consumer in node.outputs[0].consumers()]
    if len(consumers) < 2:
        return []
    name = weight.name
    shape = initializer(ir.tensor(np.array(sizes, dtype=np.int64), name=f"{name}_shape"), graph)
    (last, _), *others = consumers
    copies = []
    for number, (dequantize, consumer) in enumerate(others, 2):
        weight = insert(graph, dequantize, "Reshape", [weight, shape], {}, f"{name}_{number}")
        if dequantize is not last:  # its first consumer
            dequantize.replace_input_with(0, weight)
            last = dequantize
            continue
        attributes, scale, values = dict(dequantize.attributes), input_of(dequantize, 1), dequantize.outputs[0]
        copy = insert(graph, dequantize, "DequantizeLinear", [weight, scale], attributes, f"{name}_{number}_values")
        for index, value in enumerate(consumer.inputs):
            if value is values:
                consumer.replace_input_with(index, copy)
        copies.append(producer_of(copy))
    return copies


def _give_zero_point(dequantize: ir.Node, graph: ir.Graph) -> None:
    """ONNX Runtime fuses a Gemm only if its weight has a zero point, and one of its own at that."""
    zeros = np.zeros_like(input_of(dequantize, 1).const_value, dtype=np.int8)
    name = unique(f"{input_of(dequantize, 0).name}_zero_point", set(graph.initializers))
    zero_point = initializer(ir.tensor(zeros, name=name), graph)
    dequantize.resize_inputs(3)
    dequantize.replace_input_with(2, zero_point)


def separate_results(model: ir.Model) -> None:
    """Operations that differ only in the grid of their result each have a node of their own.

    ONNX Runtime has integer kernels for a node that one QuantizeLinear reads. It would merge equal nodes again, which
    an axis keeps apart: a DequantizeLinear with one scale for all takes no notice of it.
    """
    for node in list(model.graph):
        if node.op_type not in REPLACED | {"MatMul"} or not all(_is_value_of_codes(value) for value in node.inputs):
            continue
        readers = [reader for reader in node.outputs[0].consumers() if reader.op_type == "QuantizeLinear"]
        others = [reader for reader in readers if not _same_origin(node, reader) and OURS in _origin(reader)]
        rank = min(len(value.shape or ()) for value in node.inputs if value is not None)
        for reader, axis in zip(others, (0, *range(-1, -rank - 1, -1)), strict=False):
            _separate(node, reader, axis, model.graph)


def _is_value_of_codes(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _separate(node: ir.Node, reader: ir.Node, axis: int, graph: ir.Graph) -> None:
    values = []
    for number, value in enumerate(node.inputs):
        assert value is not None
        dequantize, name = producer_of(value), f"{reader.outputs[0].name}_operand{number}"
        values.append(insert(graph, node, "DequantizeLinear", dequantize.inputs, {"axis": axis}, name))
    copy = insert(graph, node, node.op_type, values, dict(node.attributes), f"{reader.outputs[0].name}_result")
    copy.shape, copy.type = node.outputs[0].shape, node.outputs[0].type
    producer_of(copy).metadata_props.update(reader.metadata_props)
    reader.replace_input_with(0, copy)


def keep_float(model: ir.Model) -> None:
    """What was float between two quantised tensors stays float.

    A Min with infinity keeps ONNX Runtime from replacing it by an integer kernel, whose codes differ here and there.
    Nodes that one operator of ours was translated to belong together; a pattern across two is none of ours.
    It also keeps zeros that are padded before a pooling what they are: ONNX Runtime merges the two, and a pooling's own
    padding is left out of a maximum. And it keeps a value that leaves the model as it is: ONNX Runtime would round it
    where a QuantizeLinear reads it after a Transpose or the like.
    """
    graph = model.graph
    for node in list(graph):
        y = node.outputs[0]
        is_product = node.op_type == "MatMul" and all(_is_dequantized(value) for value in node.inputs)
        # Where several read a value, its DequantizeLinear is that of the first: it does not tell whose the product is.
        is_ours = is_product and OUR_PRODUCT in _origin(node)
        if (node.op_type in REPLACED and not _takes_the_nearest(node)) or is_ours:
            if any(not _same_origin(node, other) for other in _rewritten_with(y)):
                _shield(y, graph)
        elif is_product:
            _shield(input_of(node, 0), graph)
        elif _is_padding_of_pooling(node) or (y.is_graph_output() and any(_rewritten_with(y))):
            _shield(y, graph)


def _is_padding_of_pooling(node: ir.Node) -> bool:
    return node.op_type == "Pad" and any(reader.op_type in POOLINGS for reader in node.outputs[0].consumers())


def _takes_the_nearest(node: ir.Node) -> bool:
    """Whether a node only repeats or drops values, which are the same as codes."""
    mode = node.attributes.get("mode")
    return node.op_type == "Resize" and (mode is None or mode.as_string() == "nearest")


def _same_origin(a: ir.Node, b: ir.Node) -> bool:
    return _origin(a) == _origin(b)


def _origin(node: ir.Node) -> str:
    """The call that a node was translated from."""
    return node.metadata_props.get(ORIGIN, "")


def _rewritten_with(value: ir.Value) -> Iterator[ir.Node]:
    """The QuantizeLinear, Relu and Clip nodes that ONNX Runtime may merge into the node that makes a value."""
    for node in value.consumers():
        if node.op_type in ("QuantizeLinear", "Relu", "Clip"):
            yield node
        if node.op_type in PASSED:
            yield from _rewritten_with(node.outputs[0])


def _is_dequantized(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is None:
        return False
    return node.op_type == "DequantizeLinear" or (node.op_type in PASSED and _is_dequantized(node.inputs[0]))


def _shield(value: ir.Value, graph: ir.Graph) -> None:
    infinity = initializer(ir.tensor(np.array(np.inf, dtype=np.float32), name=f"{value.name}_bound"), graph)
    users = list(value.uses())
    shield = ir.node("Min", [value, infinity])
    shield.outputs[0].name = f"{value.name}_float"
    graph.insert_after(producer_of(value), shield)
    for user, index in users:
        user.replace_input_with(index, shield.outputs[0])


def _strip(model: ir.Model, modules: Collection[str]) -> None:
    taken: set[str | None] = set()
    for node in model.graph:
        name = node.outputs[0].name if node.op_type == "QuantizeLinear" else _module_path(node, modules)
        node.name = unique(name, taken) if name else None
        for name in _defaults(node, model.opset_imports):
            del node.attributes[name]
    for value in values_of(model.graph):
        value.metadata_props.clear()
    common.ClearMetadataAndDocStringPass()(model)


def _module_path(node: ir.Node, modules: Collection[str]) -> str | None:
    """The module that a node which is named after one comes from.

    The exporter notes the modules around a node, the outermost first, each by its whole path or by a part of it that
    begins with any of the modules before.
    """
    if node.op_type not in NAMED_NODES or MODULE_PATH not in node.metadata_props:
        return None
    _, *scopes, _ = ast.literal_eval(node.metadata_props[MODULE_PATH])
    parts: list[str] = []
    for scope in scopes:
        if parts and scope.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(scope)
    path = ".".join(parts)
    return path if path in modules or not scopes else scopes[-1]


def _defaults(node: ir.Node, opsets: Mapping[str, int]) -> list[str]:
    """The attributes that say what they would say if they were left out."""
    if node.domain:
        return []
    known = onnx.defs.get_schema(node.op_type, opsets[""]).attributes
    return [name for name, attribute in node.attributes.items() if ir.to_proto(attribute) == known[name].default_value]


def _changes_nothing(first: ir.Node, second: ir.Node) -> bool:
    """Whether a Clip is behind another one with the same bounds or narrower ones."""
    bounds = [ir.convenience.get_const_tensor(input_of(node, index)) for node in (first, second) for index in (1, 2)]
    if any(bound is None for bound in bounds):
        return False
    low, high, wider_low, wider_high = (int(bound.numpy()) for bound in bounds if bound is not None)
    return wider_low <= low and high <= wider_high


def _same_constant(a: ir.Value, b: ir.Value) -> bool:
    x, y = ir.convenience.get_const_tensor(a), ir.convenience.get_const_tensor(b)
    if x is None or y is None or x.dtype != y.dtype:
        return False
    return bool(np.array_equal(x.numpy().reshape(-1), y.numpy().reshape(-1)))


ONNX_RUNTIME_PASSES: tuple[Pass, ...] = (prepare_weights, separate_results, keep_float)
"""What ONNX Runtime needs in order to compute the bits that were trained, in its integer kernels."""
