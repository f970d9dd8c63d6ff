"""Reading ONNX graphs of anybody's making: who makes a value, who reads it, what it is."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference
from torch import Tensor

Array = NDArray[Any]

FLOAT_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})

MOVING_OPERATORS = frozenset(
    {
        *("DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Slice"),
        *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
"""Operators that move values without computing any; their first input is what they move."""


class OnnxGraph:
    """The top-level graph of a model, with its values' types and the nodes at both ends of each.

    Args:
        model: any; types and shapes are inferred as far as ONNX can.

    >>> from onnx import helper
    >>> x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    >>> graph = OnnxGraph(helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "", [x], [y])))
    >>> graph.makers["y"].op_type, [node.op_type for node in graph.readers["x"]], graph.shape("y")
    ('Relu', ['Relu'], (2,))
    """

    def __init__(self, model: onnx.ModelProto):
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.makers: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.inputs: list[str] = [value.name for value in model.graph.input]
        self.outputs: list[str] = [value.name for value in model.graph.output]
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._arrays: dict[str, Array] = {}

    def opset(self, domain: str = "") -> int:
        """The version of a domain that the model uses; 0 where it uses none."""
        names = ("", "ai.onnx") if domain == "" else (domain,)
        return max((int(entry.version) for entry in self.model.opset_import if entry.domain in names), default=0)

    def type(self, name: str) -> int:
        """Element type of a value, as in `onnx.TensorProto`; 0 where ONNX cannot infer it."""
        return self._types.get(name, (0, None))[0]

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape of a value, None for what is open; None where ONNX cannot infer it."""
        return self._types.get(name, (0, None))[1]

    def maker(self, node: NodeProto, index: int) -> NodeProto | None:
        """The node that makes an input of a node."""
        return self.makers.get(node.input[index]) if index < len(node.input) else None

    def sole_reader(self, name: str) -> NodeProto | None:
        """The one node that reads a value, where nothing else does and it is no output of the model."""
        found = self.readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def origin(self, name: str) -> str:
        """The value before operators that only move it."""
        while (node := self.makers.get(name)) is not None and node.op_type in MOVING_OPERATORS:
            name = node.input[0]
        return name

    def array(self, name: str) -> Array | None:
        """A constant's values, stored or made by a Constant node; None for anything else."""
        if name not in self._arrays:
            node = self.makers.get(name)
            if name in self._stored:
                self._arrays[name] = numpy_helper.to_array(self._stored[name])
            elif node is not None and node.op_type == "Constant":
                value: Any = attributes(node)
                self._arrays[name] = (
                    numpy_helper.to_array(value["value"])
                    if "value" in value
                    else np.asarray(next(iter(value.values()), []))
                )
            else:
                return None
        return self._arrays[name]

    def is_constant(self, name: str) -> bool:
        """Whether a value does not depend on the model's inputs."""
        return name in self._constants

    @cached_property
    def _constants(self) -> set[str]:
        found = set(self._stored)
        for node in self.nodes:
            if all(name in found for name in node.input if name):
                found.update(node.output)
        return found - set(self.inputs)

    @cached_property
    def _types(self) -> dict[str, tuple[int, tuple[int | None, ...] | None]]:
        graph = shape_inference.infer_shapes(self.model).graph
        types: dict[str, tuple[int, tuple[int | None, ...] | None]] = {
            name: (tensor.data_type, tuple(tensor.dims)) for name, tensor in self._stored.items()
        }
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
            types[value.name] = (tensor.elem_type, shape if tensor.HasField("shape") else None)
        return types


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node by name, as Python values; tensors stay tensors."""
    return {a.name: a.t if a.type == AttributeProto.TENSOR else helper.get_attribute_value(a) for a in node.attribute}


def node_name(node: NodeProto) -> str:
    """What to call a node in a message: its name, or what it makes."""
    return node.name or f"{node.op_type} that makes {node.output[0]!r}"


def type_name(element_type: int) -> str:
    """The name of an element type: INT8, FLOAT8E4M3FN."""
    return str(TensorProto.DataType.Name(element_type))


def nodes_of(graph: OnnxGraph, *kinds: str) -> Iterator[NodeProto]:
    """The nodes of these kinds, in order."""
    yield from (node for node in graph.nodes if node.op_type in kinds)


def stored_tensors(path: str | Path) -> dict[str, Tensor]:
    """The initialisers of a file by name; the narrow integers and floats as float32, which holds them exactly."""
    return {tensor.name: _values(tensor) for tensor in onnx.load(path).graph.initializer}


def _values(tensor: TensorProto) -> Tensor:
    array = numpy_helper.to_array(tensor)
    # The narrow integers come as ml_dtypes, which torch does not know.
    wide = array.astype("float32") if array.dtype.kind == "V" or array.dtype.itemsize == 1 else array
    return torch.from_numpy(wide.copy())
