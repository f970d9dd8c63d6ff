"""The ONNX package's own conformance cases for QuantizeLinear and DequantizeLinear, reproduced bit for bit."""

import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from onnx import AttributeProto, TensorProto, numpy_helper
from onnx.backend.test.case import node
from torch import Tensor

from isogrid.formats import Format, IntegerGrid, NativeGrid, PerChannel, PerGroup, PerTensor, Quantized, named_format

GRIDS = {
    **{f"{u}INT{bits}": f"{u.lower()}int{bits}" for u in ("", "U") for bits in (2, 4, 8, 16)},
    "FLOAT8E4M3FN": "fp8_e4m3",
    "FLOAT8E5M2": "fp8_e5m2",
    "FLOAT4E2M1": "fp4_e2m1",
}
OPERATORS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
EXPANDED = "is the same case written out in other operators"


def node_cases() -> dict[str, Any]:
    """What `load_model_tests(kind="node")` has of these operators; to make all of its cases takes it half a minute."""
    with warnings.catch_warnings():
        # NumPy warns of the values beyond the range that the cases hold on purpose.
        warnings.simplefilter("ignore")
        for operator in OPERATORS:
            importlib.import_module(f"onnx.backend.test.case.node.{operator.lower()}")
    return {case.name: case for case in node._NodeTestCases if "quantizelinear" in case.name}


CASES = node_cases()
WRITTEN_OUT = {name: EXPANDED for name in CASES if name.endswith("_expanded")}


def as_array(value: Any) -> np.ndarray[Any, Any]:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def as_codes(array: np.ndarray[Any, Any]) -> Tensor:
    """Integers as they are, small floats as their bit patterns."""
    if array.dtype.kind in "iu" or "int" in array.dtype.name:
        return torch.from_numpy(np.array(array.astype(np.int32)))
    return torch.from_numpy(array.view(np.uint8).astype(np.int32))


def as_float(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.array(array.astype(np.float32)))


class Case:
    """One node, its arrays, and the format that stores what it stores."""

    def __init__(self, case: Any):
        (operator,) = case.model.graph.node
        self.operator: str = operator.op_type
        ((inputs, outputs),) = case.data_sets
        self.inputs, self.outputs = [as_array(x) for x in inputs], [as_array(y) for y in outputs]
        attributes: dict[str, AttributeProto] = {a.name: a for a in operator.attribute}
        self.axis = attributes["axis"].i if "axis" in attributes else 1
        self.block_size = attributes["block_size"].i if "block_size" in attributes else 0
        assert attributes.keys() <= {"axis", "block_size", "output_dtype"}
        codes = case.model.graph.input if self.operator == "DequantizeLinear" else case.model.graph.output
        self.grid = GRIDS[TensorProto.DataType.Name(codes[0].type.tensor_type.elem_type)]

    @property
    def format(self) -> Format:
        """Composed of parts: a name for every grid, the granularity by the scale's shape, a zero point if given."""
        grid = named_format(f"{self.grid}/tensor").grid
        integer = isinstance(grid, IntegerGrid) and len(self.inputs) > 2
        scale = Format(NativeGrid(torch.float32))
        return Format(grid, self.granularity, scale, Format(grid) if integer else None)

    @property
    def granularity(self) -> PerTensor | PerChannel | PerGroup:
        if self.block_size:
            return PerGroup(self.block_size, axis=self.axis)
        return PerTensor() if self.inputs[1].size == 1 else PerChannel(self.axis)

    def parameter(self, index: int) -> Tensor | None:
        """The scale or the zero point in the shape of the format's; a zero point of small floats is +0, or none."""
        if len(self.inputs) <= index:
            return None
        array = self.inputs[index]
        if index == 2 and not isinstance(self.format.grid, IntegerGrid):
            assert not as_codes(array).any()
            return None
        values = as_float(array)
        return values.reshape(self.format.scale_shape(self.inputs[0].shape))


def test_every_kind_of_type_is_among_the_cases() -> None:
    """A later package that drops or renames cases must not make this file pass by doing nothing."""
    assert len(CASES) >= 30
    reproduced = [Case(case) for name, case in CASES.items() if name not in WRITTEN_OUT]
    # The package has no case of int8.
    assert {case.grid for case in reproduced} == set(GRIDS.values()) - {"int8"}
    assert {case.operator for case in reproduced} == set(OPERATORS)
    assert all(CASES[name.removesuffix("_expanded")] for name in WRITTEN_OUT)


@pytest.mark.parametrize("name", [name for name in CASES if name not in WRITTEN_OUT])
def test_formats_reproduce(name: str) -> None:
    case = Case(CASES[name])
    if case.operator == "DynamicQuantizeLinear":
        check_dynamic(case)
    elif case.operator == "QuantizeLinear":
        # ONNX adds the zero point of small floats, +0, before it rounds: that takes the sign from an input of -0.0.
        x = as_float(case.inputs[0]) + (0.0 if len(case.inputs) > 2 else -0.0)
        quantized = case.format.quantize(x, case.parameter(1), case.parameter(2))
        assert torch.equal(quantized.codes.to(torch.int32), as_codes(case.outputs[0]))
    else:
        check_dequantize(case)


def check_dequantize(case: Case) -> None:
    fmt, codes = case.format, as_codes(case.inputs[0])
    scale, zero_point = case.parameter(1), case.parameter(2)
    assert fmt.scale is not None and scale is not None
    stored = [fmt.scale.quantize(scale)]
    if fmt.zero_point is not None and zero_point is not None:
        stored.append(fmt.zero_point.quantize(zero_point))
    values = Quantized(codes.to(fmt.grid.code_dtype), fmt, tuple(codes.shape), *stored).dequantize()
    # A float16 scale asks for a float16 result.
    expected = case.outputs[0]
    assert np.array_equal(values.numpy().astype(expected.dtype), expected, equal_nan=True)


def check_dynamic(case: Case) -> None:
    """The range that follows each tensor is what `quantize` does on its own."""
    quantized = named_format("uint8/tensor").quantize(as_float(case.inputs[0]))
    codes, scale, zero_point = case.outputs
    assert torch.equal(quantized.codes.to(torch.int32), as_codes(codes))
    assert quantized.affine.scale is not None and quantized.affine.zero_point is not None
    assert quantized.affine.scale.numpy().reshape(()) == scale
    assert quantized.affine.zero_point.numpy().reshape(()) == zero_point


def test_names_say_the_same_as_parts() -> None:
    """Formats of the cases have names in the catalog, also those with blocks on another axis."""
    case = Case(CASES["test_quantizelinear_blocked_asymmetric"])
    assert case.format == named_format("uint8/group2:axis=1")
    assert Case(CASES["test_quantizelinear_blocked_symmetric"]).format == named_format("int16/group2:axis=1")
    assert Case(CASES["test_quantizelinear_axis"]).format == named_format("uint8/channel1")
    assert Case(CASES["test_quantizelinear_int4"]).format == named_format("int4/channel:asymmetric")


def test_blocks_on_a_middle_axis_keep_ragged_ends() -> None:
    """Each block on its own, cut by hand, is the oracle."""
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    fmt, whole = named_format("int4/group2:pad,axis=1"), named_format("int4/tensor")
    values = fmt.fake_quantize(x)
    assert values.shape == x.shape
    for row in range(3):
        for column in range(2):
            for start in (0, 2, 4):
                block = x[row, start : start + 2, column]
                assert torch.equal(values[row, start : start + 2, column], whole.fake_quantize(block))
