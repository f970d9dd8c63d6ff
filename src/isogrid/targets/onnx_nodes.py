"""Reading and changing the nodes and values of an ONNX graph."""

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir


def initializer(tensor: ir.TensorProtocol, graph: ir.Graph) -> ir.Value:
    """A constant of the graph."""
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any],
    name: str,
) -> ir.Value:
    """The output, under this name, of a new node."""
    node = ir.node(op_type, inputs, attributes=attributes)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def unique(name: str, taken: set[str | None]) -> str:
    """The name, with a number behind it if a module is called more than once."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    """All values of a graph."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def input_of(node: ir.Node, index: int) -> ir.Value:
    """An input that is there."""
    value = node.inputs[index]
    assert value is not None
    return value


def producer_of(value: ir.Value) -> ir.Node:
    """The node that makes a value."""
    node = value.producer()
    assert node is not None
    return node
