"""ExecuTorch's part of the target `executorch`: lowering programs to XNNPACK, running them, reading them back."""

import importlib.metadata
import json
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # the operators that programs are made of
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
from executorch.exir import to_edge_transform_and_lower
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from flatbuffers.number_types import Float32Flags, Int32Flags, Uint8Flags
from flatbuffers.table import Table
from torch import Tensor

Tensors = dict[str, Tensor]
loaded: dict[str, Any] = {}
NOTE = "isogrid"
MOVING = ("XNNStaticTranspose", "XNNStaticReshape")
# Positions and members in schema.fbs: XNNGraph.xvalues, XValueUnion's XNNQuantizedTensorValue, XNNQuantParams'
# PerTensorQuant.
XVALUES, QUANTIZED_VALUE, PER_TENSOR = 2, 2, 2


def lower(tensors: Tensors, programs: dict[str, str], note: str, path: str, quantized: bool) -> tuple[Any, Tensors]:
    """Write a .pte file with one method for each torch.export program, given by their files, and a note.

    What is quantised in a program, XNNPACK's partitioner finds by itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = {name: torch.export.load(file) for name, file in programs.items()}
        edge = to_edge_transform_and_lower(
            exported,
            partitioner={name: [XnnpackPartitioner()] for name in exported},
            constant_methods={NOTE: torch.tensor(list(note.encode()), dtype=torch.uint8)} if note else None,
        )
        Path(path).write_bytes(edge.to_executorch().buffer)
    versions = {package: importlib.metadata.version(package) for package in ("executorch", "torch")}
    return versions, {}


def load(tensors: Tensors, path: str, threads: int) -> tuple[Any, Tensors]:
    """Load a .pte file; its note, or None where it has none."""
    if threads:
        portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(Path(path))
    loaded.clear()
    loaded["program"] = program
    for name in program.method_names:
        loaded[name] = program.load_method(name)
    if NOTE not in loaded:
        return None, {}
    return bytes(loaded[NOTE].execute([])[0].tolist()).decode(), {}


def run(tensors: Tensors, method: str) -> tuple[Any, Tensors]:
    """The outputs of a method, by their number."""
    inputs = [tensors[str(number)] for number in range(len(tensors))]
    outputs = loaded[method].execute(inputs)
    return len(outputs), {str(number): output for number, output in enumerate(outputs)}


def measure(tensors: Tensors, method: str, runs: int, clock: str) -> tuple[Any, Tensors]:
    """Seconds of each of some runs, by a function of `time`."""
    now = getattr(time, clock)
    inputs = [tensors[str(number)] for number in range(len(tensors))]
    seconds = []
    for _ in range(runs):
        start = now()
        loaded[method].execute(inputs)
        seconds.append(now() - start)
    return seconds, {}


def inspect(tensors: Tensors, path: str) -> tuple[Any, Tensors]:
    """What a .pte file runs, read back from it.

    Returns:
        For each method, its operators in order, as dictionaries: `operator` (a node of XNNPACK, or a kernel), the
        `datatypes` of its tensors and their `grids` (scale and zero point), `outputs` (numbers of the method's outputs
        that it makes), and for nodes with a constant weight `constants` (names of `weight`, `weight_scale` and
        `bias` among the tensors).
        Tensors: those constants, weights with output channels first.
    """
    file = deserialize_pte_binary(Path(path).read_bytes())
    reader = _Reader(file)
    return {plan.name: reader.operators(plan) for plan in file.program.execution_plan}, reader.tensors


class _Reader:
    """Reads the delegates of a file."""

    def __init__(self, file: Any):
        named = file.named_data
        self.named = {} if named is None else {k: bytes(named.buffers[e.buffer_index]) for k, e in _entries(named)}
        self.program = file.program
        self.tensors: Tensors = {}

    def operators(self, plan: Any) -> list[dict[str, Any]]:
        """The operators of one method."""
        found: list[dict[str, Any]] = []
        outputs = {value: number for number, value in enumerate(plan.outputs)}
        for instruction in (step for chain in plan.chains for step in chain.instructions):
            call = instruction.instr_args
            if hasattr(call, "delegate_index"):
                found += self._delegate(plan.delegates[call.delegate_index], call.args, outputs)
            elif hasattr(call, "op_index"):
                operator = plan.operators[call.op_index]
                made = sorted({outputs[value] for value in call.args if value in outputs})
                found.append({"operator": f"{operator.name}.{operator.overload}", "datatypes": [], "outputs": made})
        return found

    def _delegate(self, delegate: Any, values: list[int], outputs: dict[int, int]) -> list[dict[str, Any]]:
        data = bytes(self.program.backend_delegate_data[delegate.processed.index].data)
        header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
        data = data[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
        graph = _json_of(data)
        grids = _grids(data)
        known = {}
        for number, entry in enumerate(graph["xvalues"]):
            value = entry["xvalue_union"]
            tensor = value.get("tensor_value", value)
            known[tensor["id_out"]] = (tensor, value.get("quant_params") or {}, grids.get(number))
        makers, found = {}, []
        for node in graph["xnodes"]:
            fields = node["xnode_union"]
            ids = [fields[name] for name in fields if name.endswith("_id") and fields[name] in known]
            operator: dict[str, Any] = {
                "operator": node["xnode_union_type"],
                "datatypes": [known[i][0]["datatype"] for i in ids],
                "grids": [known[i][2] for i in ids],
                "outputs": [],
            }
            if fields.get("filter_id") in known:
                constants = (known[fields["filter_id"]], known.get(fields["bias_id"]))
                operator["constants"] = self._constants(graph, *constants, node["xnode_union_type"])
            makers[fields["output_id"]] = (operator, ids[0])
            found.append(operator)
        for made in graph["output_ids"]:
            output = outputs.get(values[known[made][0]["external_id"]])
            while made in makers and makers[made][0]["operator"] in MOVING and makers[made][1] in makers:
                made = makers[made][1]
            if output is not None and made in makers:
                makers[made][0]["outputs"].append(output)
        return found

    def _constants(self, graph: Any, weight: Any, bias: Any, node: str) -> dict[str, str]:
        names: dict[str, str] = {}
        tensor, quantization, _ = weight
        if not tensor["constant_buffer_idx"]:
            return names
        dtype = torch.float32 if tensor["datatype"] == "xnn_datatype_fp32" else torch.int8
        values = self._constant(graph, tensor["constant_buffer_idx"], dtype)
        if dtype is torch.int8 and values.numel() * 2 == _numel(tensor["dims"]):
            # Two 4-bit codes a byte, the first in the low half, each with 8 added.
            values = torch.stack([values & 15, values.view(torch.uint8).to(torch.int16) >> 4], -1).flatten() - 8
        values = values.reshape(tensor["dims"])
        if node == "XNNDepthwiseConv2d":  # [1, height, width, channels]
            values = values.permute(3, 0, 1, 2)
        elif values.dim() == 4:  # [channels, height, width, inputs]
            values = values.permute(0, 3, 1, 2)
        names["weight"] = self._keep(values)
        scales = quantization.get("scale")
        buffer = quantization.get("scale_buffer_idx", -1)
        if buffer is not None and buffer > 0:
            bits = quantization.get("scale_bf16") is not None or "group_size" in quantization
            names["weight_scale"] = self._keep(
                self._constant(graph, buffer, torch.bfloat16 if bits else torch.float32).float()
            )
        elif scales is not None:
            names["weight_scale"] = self._keep(torch.tensor(scales, dtype=torch.float32).reshape(-1))
        if bias is not None and bias[0]["constant_buffer_idx"]:
            dtype = torch.float32 if bias[0]["datatype"] == "xnn_datatype_fp32" else torch.int32
            names["bias"] = self._keep(self._constant(graph, bias[0]["constant_buffer_idx"], dtype))
        return names

    def _constant(self, graph: Any, index: int, dtype: torch.dtype) -> Tensor:
        key = graph["constant_data"][index]["named_key"]
        return torch.frombuffer(bytearray(self.named[key]), dtype=dtype)

    def _keep(self, tensor: Tensor) -> str:
        name = str(len(self.tensors))
        self.tensors[name] = tensor.contiguous()
        return name


def _grids(data: bytes) -> dict[int, tuple[float, int]]:
    """Scale and zero point of each per-tensor quantised value, by its number; flatc's JSON rounds them.

    By the positions of the fields in ExecuTorch's schema.fbs.
    """
    root = Table(data, int.from_bytes(data[:4], "little"))
    found = {}
    vector = _field(root, XVALUES)
    for number in range(root.VectorLen(vector)):
        value = Table(data, root.Indirect(root.Vector(vector) + 4 * number))
        if value.Get(Uint8Flags, _field(value, 0) + value.Pos) != QUANTIZED_VALUE:
            continue
        quantized = _table(value, 1)
        if quantized.Get(Uint8Flags, _field(quantized, 1) + quantized.Pos) != PER_TENSOR:
            continue
        grid = _table(quantized, 2)
        scale, zero_point = (_field(grid, position) for position in (0, 1))
        found[number] = (
            float(grid.Get(Float32Flags, scale + grid.Pos)) if scale else 0.0,
            int(grid.Get(Int32Flags, zero_point + grid.Pos)) if zero_point else 0,
        )
    return found


def _field(table: Any, position: int) -> int:
    return int(table.Offset(4 + 2 * position))


def _table(table: Any, position: int) -> Any:
    return Table(table.Bytes, table.Indirect(_field(table, position) + table.Pos))


def _entries(named: Any) -> Any:
    return named.pte_data.items()


def _numel(dims: list[int]) -> int:
    product = 1
    for size in dims:
        product *= size
    return product


def _json_of(data: bytes) -> Any:
    """A serialised XNNPACK graph as JSON data."""
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(_get_schema_bytes())
        binary.write_bytes(data)
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = Path(folder, "graph.json").read_text(encoding="utf-8")
        # flatc writes the bounds of a ReLU as inf, which JSON does not have and Python reads as Infinity.
        return json.loads(re.sub(r"(:\s*)\+?(-?)inf\b", r"\1\2Infinity", text))
