"""An artefact in OpenVINO: running it, and looking at what it really does."""

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import onnx
import torch
from torch import Tensor

from isogrid.errors import TargetError
from isogrid.layers.nbits import pack_matmul_nbits
from isogrid.targets.artifact import Artifact
from isogrid.targets.onnx_reading import stored_tensors
from isogrid.targets.onnx_runtime_session import quantized_tensors
from isogrid.targets.runtime import Observed, RuntimeOperator
from isogrid.targets.subprocesses import Worker

MULTIPLYING = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FOLLOWING = ("Relu", "Clip", "Div", "Round", "Mul", "QuantizeLinear")
INTEGERS = ("u8", "i8")


class OpenVinoModel:
    """An artefact in OpenVINO, in the process that has it; call it with tensors.

    Args:
        artifact: read and checked.
        threads: 0 leaves it to OpenVINO.
    """

    def __init__(self, artifact: Artifact, threads: int = 0):
        self.artifact = artifact
        self._options = {**artifact.session_options, **({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})}
        self._worker = Worker("openvino")
        self._keys = map(str, itertools.count())
        self._key, self._facts = self._load([])
        self.input_names: list[str] = self._facts["inputs"]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The model's outputs, as tensors on the CPU; raises TargetError where OpenVINO refuses the inputs."""
        results = self._run(self._key, inputs)
        return [results[name] for name in self._facts["outputs"]]

    def observe(self, *inputs: Tensor) -> Observed:
        """Run as it is, and once more with every quantised tensor in view, where OpenVINO may fuse less."""
        key, codes, layers = self._observing
        seen = self._run(key, inputs)
        watched = [seen[name] for name in self._facts["outputs"]]
        known = {**dict(zip(self.input_names, inputs, strict=True)), **seen}
        pairs = {layer: (known[x], known[y]) for layer, (x, y) in layers.items()}
        return Observed(self(*inputs), {name: seen[name] for name in codes}, pairs, watched)

    def measure(self, *inputs: Tensor, runs: int, clock: str = "perf_counter") -> list[float]:
        """Seconds of each of some runs, as a function of `time` counts them in OpenVINO's own process."""
        feeds = dict(zip(self.input_names, inputs, strict=True))
        seconds: list[float] = self._worker.call("measure", feeds, key=self._key, runs=runs, clock=clock).value
        return seconds

    def stored(self) -> Mapping[str, Tensor]:
        """The initialisers of the file, packed weights as `isogrid.layers.nbits` packs them."""
        return with_packed_weights(stored_tensors(self.artifact.path), self._file)

    def multiplications(self) -> tuple[RuntimeOperator, ...]:
        """The operations that multiply and accumulate in the graph that OpenVINO runs on this machine."""
        layers = product_layers(self._file)
        layers |= {y: layer for layer, (_, y) in packed_layers(self._file).items()}
        return tuple(
            _operator(next((layers[name] for name in map(_node_of, origins) if name in layers), ""), kind, precision)
            for _, kind, precision, origins in self._facts["operations"]
            if kind in MULTIPLYING
        )

    def producers(self) -> Mapping[str, RuntimeOperator]:
        """For each quantised tensor, the operation that makes its codes."""
        makers = {name: facts for facts in self._facts["operations"] for name in facts[3]}
        return {name: _operator(name, *makers[name][1:3]) for name in quantized_tensors(self._file) if name in makers}

    @cached_property
    def _file(self) -> onnx.ModelProto:
        return onnx.load(self.artifact.path)

    @cached_property
    def _observing(self) -> tuple[str, list[str], dict[str, tuple[str, str]]]:
        """A key for `_run`, the quantised tensors, and input and output of each layer with packed weights."""
        codes, layers = quantized_tensors(self._file), packed_layers(self._file)
        wanted = dict.fromkeys([*codes, *itertools.chain(*layers.values())])
        present = {*self.input_names, *self._facts["outputs"]}
        key, _ = self._load([name for name in wanted if name not in present])
        return key, codes, layers

    def _load(self, observed: list[str]) -> tuple[str, dict[str, Any]]:
        key, path = next(self._keys), str(self.artifact.path.resolve())
        return key, self._worker.call("load", path=path, options=self._options, observed=observed, key=key).value

    def _run(self, key: str, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if len(inputs) != len(self.input_names):
            raise TargetError(
                f"{self.artifact.path} takes {len(self.input_names)} inputs ({', '.join(self.input_names)}), "
                f"not {len(inputs)}."
            )
        feeds = {name: x.detach() for name, x in zip(self.input_names, inputs, strict=True)}
        return self._worker.call("run", feeds, key=key).tensors


def with_packed_weights(stored: Mapping[str, Tensor], model: onnx.ModelProto) -> dict[str, Tensor]:
    """The stored tensors of a file, those of packed layers in the form and under the names that layers have them."""
    found = dict(stored)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in found and _block(node):
            codes, scales = found.pop(node.input[0]), found.pop(node.input[1])
            bits = 4 if _type(model, node.input[0]) == onnx.TensorProto.INT4 else 8
            packed = pack_matmul_nbits(codes.T.to(torch.int8).contiguous(), bits, _block(node))
            found[node.input[0].removesuffix("_codes")] = packed
            found[node.input[1].removesuffix("s")] = scales.T.contiguous()
    return found


def product_layers(model: onnx.ModelProto) -> dict[str, str]:
    """The layer that each name in a file belongs to: of its product, and of what follows that up to its codes.

    OpenVINO moves factors into a product and then calls it by none of its own names.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, str] = {}
    for layer in model.graph.node:
        node = layer if layer.op_type in PRODUCTS else None
        while node is not None:
            found |= dict.fromkeys((node.name, *node.output), layer.name)
            after = readers.get(node.output[0], [])
            node = after[0] if len(after) == 1 and after[0].op_type in FOLLOWING else None
    return found


def _type(model: onnx.ModelProto, name: str) -> int:
    return next(int(tensor.data_type) for tensor in model.graph.initializer if tensor.name == name)


def packed_layers(model: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """Names of the input and the output of every layer whose weight is stored in groups, by the layer's name."""
    stored = {tensor.name for tensor in model.graph.initializer}
    packed = {node.output[0] for node in model.graph.node if node.input and node.input[0] in stored and _block(node)}
    readers = {name: node for node in model.graph.node for name in node.input}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in packed:
            after = readers.get(node.output[0])
            has_bias = after is not None and after.op_type == "Add" and after.input[1] in stored
            found[node.name] = (node.input[0], after.output[0] if has_bias and after is not None else node.output[0])
    return found


def _block(node: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "block_size"), 0)


def _node_of(origin: str) -> str:
    """The node of the file; OpenVINO adds to the names of those that it splits."""
    return origin.partition("/")[0]


def _operator(name: str, kind: str, precision: str) -> RuntimeOperator:
    return RuntimeOperator(name, f"{kind} ({precision})", "integer" if precision in INTEGERS else "float")
