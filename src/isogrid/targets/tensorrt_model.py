"""A file for TensorRT in ONNX Runtime, run node by node as it is written."""

import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime import InferenceSession
from torch import Tensor

from isogrid.errors import TargetError
from isogrid.targets.artifact import Artifact
from isogrid.targets.onnx_half import as_written, half_ends
from isogrid.targets.onnx_reading import OnnxGraph, nodes_of, stored_tensors
from isogrid.targets.onnx_runtime_session import open_session, quantized_tensors
from isogrid.targets.onnx_stored import stored_parts
from isogrid.targets.openvino_model import packed_layers, with_packed_weights
from isogrid.targets.runtime import Observed, RuntimeOperator
from isogrid.targets.tensorrt_placement import is_dequantized, weighted

SMALL_FLOATS = (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT4E2M1)


class TensorRtModel:
    """A strongly typed Q/DQ file; call it with tensors.

    Args:
        artifact: read and checked.
        threads: within an operator; 0 leaves it to ONNX Runtime.
    """

    def __init__(self, artifact: Artifact, threads: int = 0):
        self.artifact, self._threads = artifact, threads
        self._session = open_session(artifact.path, artifact.session_options, threads)
        if half_ends(self._graph):
            self._session = self._opened(as_written(self._file))
        self.input_names: list[str] = [entry.name for entry in self._session.get_inputs()]
        self._output_names: list[str] = [entry.name for entry in self._session.get_outputs()]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The model's outputs, as tensors on the CPU; raises TargetError where ONNX Runtime refuses the inputs."""
        return list(self._run(self._session, self._output_names, inputs).values())

    def observe(self, *inputs: Tensor) -> Observed:
        """Run with every quantised tensor, and every layer with packed weights, in view."""
        codes, layers = self._codes, self._layers
        wanted = dict.fromkeys([*self._output_names, *codes, *sum(layers.values(), ())])
        names = [name for name in wanted if name not in self.input_names]
        seen = self._run(self._observing, names, inputs)
        known = {**dict(zip(self.input_names, inputs, strict=True)), **seen}
        pairs = {layer: (known[x], known[y]) for layer, (x, y) in layers.items()}
        return Observed([seen[name] for name in self._output_names], {name: seen[name] for name in codes}, pairs)

    def stored(self) -> Mapping[str, Tensor]:
        """The tensors of the file; biases as the codes that they were, packed weights as layers pack them."""
        found = with_packed_weights(stored_tensors(self.artifact.path), self._file) | stored_parts(self._file)
        for node in weighted(self._graph):
            makers = [self._graph.makers.get(self._graph.origin(name)) for name in node.input[:2]]
            if len(node.input) < 3 or any(m is None or m.op_type != "DequantizeLinear" for m in makers):
                continue
            scales = [found.get(maker.input[1]) for maker in makers if maker is not None]
            bias = found.get(node.input[2])
            if bias is not None and all(scale is not None for scale in scales):
                step: Any = scales[0] * scales[1].reshape(-1)  # type: ignore[operator, union-attr]
                found[node.input[2].removesuffix("_values")] = torch.round(bias / step)
        return found

    def multiplications(self) -> tuple[RuntimeOperator, ...]:
        """The products; integer where both operands are dequantised, which TensorRT then multiplies as integers."""
        return tuple(
            RuntimeOperator(node.name, node.op_type, "integer" if self._is_integer(node) else "float")
            for node in weighted(self._graph)
        )

    def producers(self) -> Mapping[str, RuntimeOperator]:
        """For each quantised tensor, its QuantizeLinear."""
        return {name: RuntimeOperator(name, "QuantizeLinear", "integer") for name in self._codes}

    def _is_integer(self, node: onnx.NodeProto) -> bool:
        makers = [self._graph.makers.get(self._graph.origin(name)) for name in node.input[:2]]
        return all(m is not None and is_dequantized(self._graph, m.output[0]) and self._has_codes(m) for m in makers)

    def _has_codes(self, dequantize: onnx.NodeProto) -> bool:
        return self._graph.type(dequantize.input[0]) not in SMALL_FLOATS

    @cached_property
    def _codes(self) -> list[str]:
        """The quantised tensors; FP8 values are no codes."""
        return [name for name in quantized_tensors(self._file) if self._graph.type(name) not in SMALL_FLOATS]

    @cached_property
    def _layers(self) -> dict[str, tuple[str, str]]:
        """Input and output of the layers on weights in blocks or of small floats, by their names."""
        found = packed_layers(self._file) | half_ends(self._graph)
        for node in nodes_of(self._graph, "MatMul"):
            weight, x = (self._graph.makers.get(node.input[index]) for index in (1, 0))
            if weight is None or self._has_codes(weight) or node.name in found:
                continue
            after = self._graph.sole_reader(node.output[0])
            adds = after is not None and after.op_type == "Add" and self._graph.is_constant(after.input[1])
            quantize = None if x is None or not x.input else self._graph.makers.get(x.input[0])
            entering = node.input[0] if quantize is None else quantize.input[0]
            found[node.name] = (entering, after.output[0] if adds and after is not None else node.output[0])
        return found

    @cached_property
    def _file(self) -> onnx.ModelProto:
        return onnx.load(self.artifact.path)

    @cached_property
    def _graph(self) -> OnnxGraph:
        return OnnxGraph(self._file)

    @cached_property
    def _observing(self) -> InferenceSession:
        """A session that also puts out what is computed on the way; nothing is fused, so that it computes the same."""
        model = as_written(self._file)
        wanted = [*self._codes, *sum(self._layers.values(), ())]
        present = {value.name for value in (*model.graph.input, *model.graph.output)}
        model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys(wanted) if n not in present)
        return self._opened(model)

    def _opened(self, model: onnx.ModelProto) -> InferenceSession:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "changed.onnx")
            onnx.save(model, path)
            return open_session(path, self.artifact.session_options, self._threads)

    def _run(self, session: InferenceSession, names: list[str], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if len(inputs) != len(self.input_names):
            raise TargetError(
                f"{self.artifact.path} takes {len(self.input_names)} inputs ({', '.join(self.input_names)}), "
                f"not {len(inputs)}."
            )
        feeds = {name: x.detach().cpu().numpy() for name, x in zip(self.input_names, inputs, strict=True)}
        try:
            values = session.run(names, feeds)
        except Exception as error:  # its exceptions share no base class
            raise TargetError(f"ONNX Runtime cannot run {self.artifact.path} on these inputs: {error}") from error
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
