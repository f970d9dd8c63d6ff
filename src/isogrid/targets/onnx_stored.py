"""Linear layers on FP8 and NVFP4 weights in ONNX files: a weight of small floats under one DequantizeLinear or two.

The exporter writes one node of our own for each layer. Once the file is whole, the node becomes

- FP8: QuantizeLinear and DequantizeLinear of the input, DequantizeLinear of the weight, one scale each, and MatMul;
- NVFP4: a DequantizeLinear of the FP8 scales by one float32 scale, with these a DequantizeLinear of the FP4 weight in
  blocks of 16 inputs, and MatMul with the float input.

Weights are stored [in, out], as MatMul takes them.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import values
from torch import Tensor, nn
from torch.library import custom_op

from isogrid.formats import named_format
from isogrid.layers.stored import StoredLinear
from isogrid.targets.onnx_nodes import insert, producer_of
from isogrid.targets.onnx_passes import Array, constant, stored

DOMAIN, BLOCK, OPSET_OF_FP4 = "isogrid.stored", 16, 23
FP8, FP4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
FORMATS = {"fp8": named_format("fp8_e4m3/tensor"), "nvfp4": named_format("nvfp4")}


class _Exported(nn.Module):
    """A stored layer as one operator, under the names that its buffers have."""

    def __init__(self, layer: StoredLinear, kind: str):
        super().__init__()
        self.kind, self.input = kind, layer.input
        for name, buffer in layer._buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        own = self._buffers
        scales = (own["weight_scale"], own.get("weight_scale_scale"))
        input_scale = None if self.input is None else self.input.scale
        return torch.ops.isogrid.stored_linear(x, own["weight"], *scales, input_scale, own["bias"], self.kind)  # type: ignore[no-any-return]


def stored_form(module: nn.Module) -> nn.Module | None:
    """An FP8 or NVFP4 layer as one operator; None for other modules."""
    if not isinstance(module, StoredLinear):
        return None
    kind = next((kind for kind, fmt in FORMATS.items() if module.format == fmt), None)
    return None if kind is None else _Exported(module, kind)


@custom_op("isogrid::stored_linear", mutates_args=())
def stored_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    scale_scale: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    kind: str,
) -> Tensor:
    """A linear layer, x [..., in] to [..., out], on weight codes uint8 [out, in] of small floats."""
    values_, fp8 = FORMATS[kind].grid.decode(weight, None), FORMATS["fp8"].grid
    if scale_scale is not None:
        scale = fp8.decode(scale, None) * scale_scale
    wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    if input_scale is not None:
        x = fp8.nearest(x / input_scale, None) * input_scale
    return nn.functional.linear(x, values_ * wide, bias)


@stored_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _schema() -> OpSchema:
    """What the exporter has to know about our node in order to write one."""
    parameter, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    return OpSchema(
        "StoredLinear",
        DOMAIN,
        1,
        inputs=[
            parameter("x", "F"),
            parameter("weight", "tensor(uint8)"),
            parameter("scale", "S"),
            *(parameter(name, "F", param_option=optional) for name in ("scale_scale", "input_scale", "bias")),
        ],
        outputs=[parameter("y", "F")],
        type_constraints=[("F", ["tensor(float)"], ""), ("S", ["tensor(float)", "tensor(uint8)"], "")],
        attributes=[OpSchema.Attribute("kind", OpSchema.AttrType.STRING)],
    )


STORED_LINEAR = values.Op(values.Opset(DOMAIN, 1), "StoredLinear", _schema())


def translated(x: Any, weight: Any, scale: Any, scale_scale: Any, input_scale: Any, bias: Any, kind: str) -> Any:
    """The node that stands for the layer until `write_stored_layers`."""
    return STORED_LINEAR(x, weight, scale, scale_scale, input_scale, bias, kind=kind)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {torch.ops.isogrid.stored_linear.default: translated}
"""For `torch.onnx.export(custom_translation_table=...)`."""


def write_stored_layers(model: ir.Model) -> None:
    """Write each of our nodes in ONNX's own operators."""
    for node in list(model.graph):
        if node.op_type == "StoredLinear" and node.domain == DOMAIN:
            writer = _Writer(model.graph, node)
            y = writer.fp8() if node.attributes["kind"].as_string() == "fp8" else writer.nvfp4()
            producer_of(y).metadata_props.update(node.metadata_props)
            if len(node.inputs) > 5 and node.inputs[5] is not None:
                y = writer.insert("Add", [y, node.inputs[5]], f"{node.outputs[0].name}_sum")
            y.name, node.outputs[0].name = node.outputs[0].name, None
            y.shape, y.type = node.outputs[0].shape, node.outputs[0].type
            ir.convenience.replace_all_uses_with(node.outputs[0], y, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            if writer.has_fp4:
                model.opset_imports[""] = max(model.opset_imports[""], OPSET_OF_FP4)
    model.opset_imports.pop(DOMAIN, None)


class _Writer:
    """Writes one layer before its node."""

    def __init__(self, graph: ir.Graph, node: ir.Node):
        self.graph, self.node, self.has_fp4 = graph, node, False
        self.name = str(node.inputs[1].name)  # type: ignore[union-attr]
        self.y = f"{node.outputs[0].name}_product"

    def insert(self, kind: str, inputs: list[ir.Value | None], name: str, **attributes: int) -> ir.Value:
        return insert(self.graph, self.node, kind, inputs, attributes, name)

    def array(self, index: int) -> Array:
        return constant(self.node.inputs[index])

    def keep(self, values_: Array, name: str) -> ir.Value:
        return stored(self.graph, np.ascontiguousarray(values_), name)

    def scalar(self, index: int) -> ir.Value:
        """A scale of one element, without dimensions."""
        value = self.node.inputs[index]
        assert value is not None
        return self.keep(self.array(index).reshape(()), f"{value.name}s")

    def zero(self) -> ir.Value:
        return self.keep(np.zeros((), FP8), f"{self.name}_zero")

    def fp8(self) -> ir.Value:
        x, scale, zero = self.node.inputs[0], self.scalar(4), self.zero()
        codes = self.insert("QuantizeLinear", [x, scale, zero], f"{self.name}_input")
        x = self.insert("DequantizeLinear", [codes, scale, zero], f"{self.name}_input_values")
        weight = self.keep(self.array(1).view(FP8).T, f"{self.name}_codes")
        wide = self.insert("DequantizeLinear", [weight, self.scalar(2), zero], f"{self.name}_values")
        return self.insert("MatMul", [x, wide], self.y)

    def nvfp4(self) -> ir.Value:
        self.has_fp4 = True
        scales = self.keep(self.array(2).view(FP8).T, f"{self.name}_scale_codes")
        steps = self.insert("DequantizeLinear", [scales, self.scalar(3), self.zero()], f"{self.name}_steps")
        weight = self.keep(self.array(1).astype(np.uint8).view(FP4).T, f"{self.name}_codes")
        wide = self.insert("DequantizeLinear", [weight, steps], f"{self.name}_values", axis=0, block_size=BLOCK)
        return self.insert("MatMul", [self.node.inputs[0], wide], self.y)


def stored_parts(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The weights of such layers in a file as layers have them: bit patterns uint8 [out, in], and scales."""
    found = {}
    for tensor in model.graph.initializer:
        values_ = onnx.numpy_helper.to_array(tensor)
        small = values_.dtype in (np.dtype(FP8), np.dtype(FP4)) and values_.ndim == 2
        if small and tensor.name.endswith("_codes"):
            bits = torch.from_numpy(np.ascontiguousarray(values_.T).view(np.uint8).copy())
            found[tensor.name.removesuffix("_codes")] = bits
        elif tensor.name.endswith("scales") and values_.dtype == np.float32 and values_.ndim == 0:
            found[tensor.name.removesuffix("s")] = torch.from_numpy(values_.reshape(1).copy())
    return found
