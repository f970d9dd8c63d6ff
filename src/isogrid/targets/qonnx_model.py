"""An artefact in the interpreter of the package qonnx."""

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
import onnx
import torch
from onnx import NodeProto
from torch import Tensor

from isogrid.errors import TargetError
from isogrid.targets.artifact import Artifact
from isogrid.targets.onnx_reading import Array, OnnxGraph, attributes, nodes_of, stored_tensors
from isogrid.targets.runtime import Observed, RuntimeOperator
from isogrid.targets.subprocesses import Worker

PRODUCTS = ("Conv", "Gemm", "MatMul")


class QonnxModel:
    """A QONNX file, run node by node in the process that has qonnx; call it with tensors.

    Inputs of more examples than the file's batch run in pieces of that size.

    Args:
        artifact: read and checked.
    """

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        self._worker = Worker("qonnx")
        self._facts = self._worker.call("load", path=str(artifact.path.resolve()), key="model").value
        self.input_names: list[str] = [name for name, _ in self._facts["inputs"]]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The model's outputs, as tensors on the CPU."""
        return list(self._run(inputs, self._facts["outputs"]).values())

    def observe(self, *inputs: Tensor) -> Observed:
        """The outputs, and the codes of every Quant of an activation."""
        activations = {node.output[0]: node for node in self._activations}
        seen = self._run(inputs, [*self._facts["outputs"], *activations])
        outputs = [seen[name] for name in self._facts["outputs"]]
        codes = {name: _codes(seen[name], *self._grid(node)) for name, node in activations.items()}
        return Observed(outputs, codes, {})

    def stored(self) -> Mapping[str, Tensor]:
        """Codes and scales, read back from the values that the file stores."""
        found = stored_tensors(self.artifact.path)
        for node in nodes_of(self._graph, *PRODUCTS):
            weight, x = self._graph.maker(node, 1), self._graph.makers.get(self._graph.origin(node.input[0]))
            if weight is None or x is None or weight.op_type != "Quant" or x.op_type != "Quant":
                continue
            name = weight.output[0].removesuffix("_on_grid")
            scale, _ = self._grid(weight)
            found[name] = _codes(torch.from_numpy(self._array(weight.input[0]).copy()), scale, 0.0)
            found[f"{name}_scale"] = scale.reshape(-1)
            if len(node.input) > 2:
                step = self._grid(x)[0] * scale.reshape(-1)
                bias = torch.from_numpy(self._array(node.input[2]).copy())
                found[node.input[2].removesuffix("_values")] = _codes(bias, step, 0.0)
        return found

    def multiplications(self) -> tuple[RuntimeOperator, ...]:
        """The products; integer where both operands are Quant, for FINN and its like multiply their integers."""
        graph = self._graph
        return tuple(
            RuntimeOperator(node.name, node.op_type, "integer" if _of_integers(graph, node) else "float")
            for node in nodes_of(graph, *PRODUCTS)
        )

    def producers(self) -> Mapping[str, RuntimeOperator]:
        """For each quantised tensor, its Quant."""
        return {node.output[0]: RuntimeOperator(node.output[0], "Quant", "integer") for node in self._activations}

    @cached_property
    def _graph(self) -> OnnxGraph:
        return OnnxGraph(onnx.load(self.artifact.path))

    @property
    def _activations(self) -> Iterator[NodeProto]:
        graph = self._graph
        yield from (node for node in nodes_of(graph, "Quant") if not graph.is_constant(node.input[0]))

    def _array(self, name: str) -> Array:
        array = self._graph.array(name)
        if array is None:
            raise TargetError(f"{self.artifact.path} computes {name!r}, which has to be stored. Export it again.")
        return array

    def _grid(self, node: NodeProto) -> tuple[Tensor, float]:
        """Scale and zero point of a Quant."""
        return torch.from_numpy(np.array(self._array(node.input[1]))), float(self._array(node.input[2]))

    def _run(self, inputs: tuple[Tensor, ...], names: list[str]) -> dict[str, Tensor]:
        if len(inputs) != len(self.input_names):
            raise TargetError(
                f"{self.artifact.path} takes {len(self.input_names)} inputs ({', '.join(self.input_names)}), "
                f"not {len(inputs)}."
            )
        size = int(self._facts["inputs"][0][1][0])
        if len(inputs[0]) % size:
            raise TargetError(
                f"{self.artifact.path} takes {size} examples at a time, and {len(inputs[0])} are no multiple of that. "
                "Plan with example inputs of one example."
            )
        pieces = []
        for start in range(0, len(inputs[0]), size):
            feeds = {name: x[start : start + size] for name, x in zip(self.input_names, inputs, strict=True)}
            pieces.append(self._worker.call("run", feeds, key="model", names=names).tensors)
        return {name: torch.cat([piece[name] for piece in pieces]) for name in names}


def _codes(values: Tensor, scale: Tensor, zero_point: float) -> Tensor:
    return torch.round(values / scale) + zero_point


def _of_integers(graph: OnnxGraph, node: NodeProto) -> bool:
    makers = (graph.makers.get(graph.origin(name)) for name in node.input[:2])
    return all(maker is not None and maker.op_type == "Quant" for maker in makers)


def bit_widths(model: onnx.ModelProto) -> dict[str, tuple[int, bool]]:
    """Bits of every Quant, and whether it is signed, by the name of what it makes.

    Args:
        model: a QONNX file.
    """
    graph, found = OnnxGraph(model), {}
    for node in nodes_of(graph, "Quant"):
        bits = graph.array(node.input[3])
        if bits is not None:
            found[node.output[0].removesuffix("_on_grid")] = (int(bits), bool(attributes(node)["signed"]))
    return found
