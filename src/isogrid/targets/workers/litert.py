"""LiteRT's part of the target `litert`: converting programs to .tflite files, running them, reading them back."""

import importlib.metadata
import logging
import re
import time
import warnings
from pathlib import Path
from typing import Any

import flatbuffers
import litert_torch
import numpy
import torch
import torch.ao.quantization.fx._decomposed  # the operators that programs are made of
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
from litert_torch.quantize.quant_config import QuantConfig
from torch import Tensor

Tensors = dict[str, Tensor]
loaded: dict[str, Any] = {}

NOTE = "isogrid"
IDENTIFIER = b"TFL3"
TYPES = {
    schema.TensorType.FLOAT32: torch.float32,
    schema.TensorType.INT8: torch.int8,
    schema.TensorType.INT32: torch.int32,
    schema.TensorType.INT64: torch.int64,
}
MOVING = ("TRANSPOSE", "RESHAPE")


def lower(tensors: Tensors, programs: dict[str, str], note: str, path: str, quantized: bool) -> tuple[Any, Tensors]:
    """Write a .tflite file with one signature for each torch.export program, given by their files, and a note."""
    quantizer = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    config = QuantConfig(pt2e_quantizer=quantizer) if quantized else None
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converter = litert_torch._convert.interface.Converter()
        for name, file in programs.items():
            program = torch.export.load(file)
            converter.signature(name, program.module(check_guards=False), program.example_inputs[0])
        converter.convert(quant_config=config, strict_export=False).export(path)
    if note:
        _write_note(path, note)
    packages = ("ai-edge-litert", "litert-torch", "torch")
    return {package: importlib.metadata.version(package) for package in packages}, {}


def _write_note(path: str, note: str) -> None:
    """Add a note to a file's metadata."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(Path(path).read_bytes()))
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = numpy.frombuffer(note.encode(), dtype=numpy.uint8)
    entry.name, entry.buffer = NOTE, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), IDENTIFIER)
    Path(path).write_bytes(bytes(builder.Output()))


def load(tensors: Tensors, path: str, threads: int) -> tuple[Any, Tensors]:
    """Load a .tflite file; its note, or None where it has none."""
    interpreter = Interpreter(path, num_threads=threads or None)
    loaded.clear()
    loaded["interpreter"] = interpreter
    for name in interpreter.get_signature_list():
        loaded[name] = interpreter.get_signature_runner(name)
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(Path(path).read_bytes()))
    for entry in model.metadata or []:
        if entry.name in (NOTE, NOTE.encode()):
            return bytes(bytearray(model.buffers[entry.buffer].data)).decode(), {}
    return None, {}


def run(tensors: Tensors, method: str) -> tuple[Any, Tensors]:
    """The outputs of a signature, by their number; inputs and outputs are as the file has them, int8 or float."""
    results = loaded[method](**_arguments(tensors, method))
    names = sorted(results, key=_number)
    return len(names), {str(number): torch.from_numpy(results[name].copy()) for number, name in enumerate(names)}


def grids(tensors: Tensors, method: str) -> tuple[Any, Tensors]:
    """Scale and zero point of each input and of each output of a signature, or None; in order."""
    runner = loaded[method]
    found = []
    for details in (runner.get_input_details(), runner.get_output_details()):
        entries = [details[name] for name in sorted(details, key=_number)]
        found.append([_grid(entry["quantization_parameters"]) for entry in entries])
    return found, {}


def measure(tensors: Tensors, method: str, runs: int, clock: str) -> tuple[Any, Tensors]:
    """Seconds of each of some runs, by a function of `time`."""
    now = getattr(time, clock)
    arguments = _arguments(tensors, method)
    seconds = []
    for _ in range(runs):
        start = now()
        loaded[method](**arguments)
        seconds.append(now() - start)
    return seconds, {}


def inspect(tensors: Tensors, path: str) -> tuple[Any, Tensors]:
    """What a .tflite file holds, read back from it.

    Returns:
        For each signature, its operators in order, as dictionaries: `operator`, the `datatypes` of its tensors and
        their `grids` (scale and zero point), `outputs` (numbers of the signature's outputs that it makes), and for
        operators with a constant weight `constants` (names of `weight`, `weight_scale` and `bias` among the tensors).
        Tensors: those constants, weights with output channels first.
    """
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(Path(path).read_bytes()))
    reader = _Reader(model)
    return {_text(s.signatureKey): reader.operators(s) for s in model.signatureDefs}, reader.tensors


class _Reader:
    """Reads the subgraphs of a file."""

    def __init__(self, model: Any):
        self.model = model
        self.tensors: Tensors = {}
        codes = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
        self.names = [codes[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]

    def operators(self, signature: Any) -> list[dict[str, Any]]:
        """The operators of one signature."""
        graph = self.model.subgraphs[signature.subgraphIndex]
        ordered = sorted(signature.outputs, key=lambda entry: _number(_text(entry.name)))
        outputs = {entry.tensorIndex: number for number, entry in enumerate(ordered)}
        makers, found = {}, []
        for node in graph.operators:
            name = self.names[node.opcodeIndex]
            ids = [index for index in (*node.inputs, *node.outputs) if index >= 0]
            tensors = [graph.tensors[index] for index in ids]
            operator: dict[str, Any] = {
                "operator": name,
                "datatypes": [str(TYPES.get(tensor.type, tensor.type)) for tensor in tensors],
                "grids": [_per_tensor(tensor.quantization) for tensor in tensors],
                "outputs": [],
            }
            if name in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
                operator["constants"] = self._constants(graph, node.inputs, name)
            makers.update(dict.fromkeys(node.outputs, (operator, node.inputs[0])))
            found.append(operator)
        for made, number in outputs.items():
            while made in makers and makers[made][0]["operator"] in MOVING and makers[made][1] in makers:
                made = makers[made][1]
            if made in makers:
                makers[made][0]["outputs"].append(number)
        return found

    def _constants(self, graph: Any, inputs: Any, name: str) -> dict[str, str]:
        weight = graph.tensors[inputs[1]]
        values = self._values(weight)
        if values is None:
            return {}
        if name == "DEPTHWISE_CONV_2D":  # [1, height, width, channels]
            values = values.permute(3, 0, 1, 2)
        elif name == "CONV_2D":  # [channels, height, width, inputs]
            values = values.permute(0, 3, 1, 2)
        names = {"weight": self._keep(values)}
        if weight.quantization is not None and weight.quantization.scale is not None:
            scales = numpy.asarray(weight.quantization.scale, dtype=numpy.float32)
            names["weight_scale"] = self._keep(torch.from_numpy(scales.copy()))
        bias = self._values(graph.tensors[inputs[2]]) if len(inputs) > 2 and inputs[2] >= 0 else None
        if bias is not None:
            names["bias"] = self._keep(bias)
        return names

    def _values(self, tensor: Any) -> Tensor | None:
        data = self.model.buffers[tensor.buffer].data
        if data is None or not len(data) or tensor.type not in TYPES:
            return None
        return torch.frombuffer(bytearray(data), dtype=TYPES[tensor.type]).reshape(list(tensor.shape))

    def _keep(self, tensor: Tensor) -> str:
        name = str(len(self.tensors))
        self.tensors[name] = tensor.contiguous()
        return name


def _arguments(tensors: Tensors, method: str) -> dict[str, Any]:
    names = sorted(loaded[method].get_input_details(), key=_number)
    return {name: tensors[str(number)].numpy() for number, name in enumerate(names)}


def _number(name: str) -> int:
    """The number in a name such as `args_10` or `output_2`."""
    found = re.findall(r"\d+", name)
    return int(found[0]) if found else 0


def _grid(parameters: Any) -> list[Any] | None:
    scales, zero_points = parameters["scales"], parameters["zero_points"]
    return [float(scales[0]), int(zero_points[0])] if len(scales) == 1 else None


def _per_tensor(quantization: Any) -> list[Any] | None:
    if quantization is None or quantization.scale is None or len(quantization.scale) != 1:
        return None
    return [float(quantization.scale[0]), int(quantization.zeroPoint[0])]


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
