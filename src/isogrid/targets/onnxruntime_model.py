"""An artefact in ONNX Runtime: running it, and looking at what it really does."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from onnxruntime import InferenceSession
from torch import Tensor

from isogrid.errors import ArtifactError, TargetError
from isogrid.layers.nbits import quantizes_input
from isogrid.targets.artifact import Artifact
from isogrid.targets.onnx_activations import LOOK_UP
from isogrid.targets.onnx_reading import stored_tensors
from isogrid.targets.onnx_runtime_session import (
    FLOAT_OPERATORS,
    INTEGER_OPERATORS,
    open_session,
    operator_counts,
    optimized_graph,
    options_here,
    quantized_tensors,
)
from isogrid.targets.runtime import Observed, RuntimeOperator

PACKED_LINEAR = "MatMulNBits"
MOVING_OPERATORS = frozenset({"Cast", "Clip", "Reshape", "Transpose", "ReorderInput", "ReorderOutput"})
"""What may stand between the kernel that computes codes and the tensor that is named after them."""


class _Observing(NamedTuple):
    """A session that also puts out what is computed on the way.

    Attributes:
        session: with more outputs than the artefact has.
        codes: names of the quantised tensors.
        layers: names of the input and the output of every MatMulNBits, by the layer's name.
        graph: what this session runs.
    """

    session: InferenceSession
    codes: list[str]
    layers: dict[str, tuple[str, str]]
    graph: onnx.ModelProto


class OnnxRuntimeModel:
    """An artefact in an ONNX Runtime session; call it with tensors.

    Args:
        artifact: read and checked.
        threads: within an operator; 0 leaves it to ONNX Runtime.

    Raises:
        ArtifactError: the artefact's options are not those that its file was exported with.
        TargetError: ONNX Runtime cannot load it.
    """

    def __init__(self, artifact: Artifact, threads: int = 0):
        self.artifact = artifact
        self.threads = threads
        self.options = options_here(artifact.session_options)
        self.session = open_session(artifact.path, self.options, threads)
        self._check_options()
        self.input_names: list[str] = [entry.name for entry in self.session.get_inputs()]
        self.output_names: list[str] = [entry.name for entry in self.session.get_outputs()]

    def _check_options(self) -> None:
        """The file says too which options it needs: with others ONNX Runtime may compute something else."""
        written = self.session.get_modelmeta().custom_metadata_map.get("isogrid.session_options")
        needed = json.loads(written) if written else self.artifact.session_options
        given = self.artifact.session_options
        for name in sorted(needed.keys() | given.keys()):
            if needed.get(name) != given.get(name):
                raise ArtifactError(
                    f"{self.artifact.path} was exported for {name}={needed.get(name, 'unset')}, but is opened with "
                    f"{given.get(name, 'unset')}: ONNX Runtime would compute something else than was trained. Restore "
                    "the sidecar, or export again."
                )

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The model's outputs, as tensors on the CPU; raises TargetError where ONNX Runtime refuses the inputs."""
        return list(self._run(self.session, self.output_names, self._feeds(inputs)).values())

    def observe(self, *inputs: Tensor) -> Observed:
        """Run as it is, and once more with every quantised tensor and every MatMulNBits in view.

        Raises:
            TargetError: as outputs, these tensors would change how ONNX Runtime computes.
        """
        feeds = self._feeds(inputs)
        session, codes, layers, _ = self._observing
        names = [name for name in dict.fromkeys([*codes, *sum(layers.values(), ())]) if name not in feeds]
        seen = self._run(session, names, feeds) if names else {}
        known = {**{name: torch.from_numpy(x) for name, x in feeds.items()}, **seen}
        pairs = {layer: (known[x], known[y]) for layer, (x, y) in layers.items()}
        return Observed(self(*inputs), {name: seen[name] for name in codes}, pairs)

    def stored(self) -> Mapping[str, Tensor]:
        """The initialisers of the file; the narrow integers as float32, which holds them exactly."""
        return stored_tensors(self.artifact.path)

    def multiplications(self) -> tuple[RuntimeOperator, ...]:
        """The operators that multiply and accumulate in the graph that ONNX Runtime runs on this machine."""
        nodes = self._optimized.graph.node
        return tuple(_operator(node, _layer_name(node)) for node in nodes if _multiplies(node))

    def producers(self) -> Mapping[str, RuntimeOperator]:
        """For each quantised tensor, the operator that makes its codes; where nothing was fused, that of the floats."""
        _, codes, _, graph = self._observing
        makers = {name: node for node in graph.graph.node for name in node.output}
        found = {}
        for name in codes:
            node = makers.get(name)
            while node is not None and node.op_type in MOVING_OPERATORS and node.input[0] in makers:
                node = makers[node.input[0]]
            if node is not None and node.op_type == "QuantizeLinear":
                node = makers.get(node.input[0], node)
            if node is not None:
                found[name] = _operator(node, name)
        return found

    @cached_property
    def _optimized(self) -> onnx.ModelProto:
        return optimized_graph(self.artifact.path, self.options)

    @cached_property
    def _observing(self) -> _Observing:
        model = onnx.load(self.artifact.path)
        codes = quantized_tensors(model)
        nodes = [node for node in model.graph.node if node.op_type == PACKED_LINEAR]
        layers = {node.name: (node.input[0], node.output[0]) for node in nodes}
        present = {value.name for value in (*model.graph.input, *model.graph.output)}
        wanted = dict.fromkeys([*codes, *sum(layers.values(), ())])
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in present)
        options = self.options
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "observed.onnx")
            onnx.save(model, path)
            session = open_session(path, options, self.threads)
            graph = optimized_graph(path, options)
        as_is, observed = (operator_counts(each) for each in (self._optimized, graph))
        if (as_is.integer, as_is.floating) != (observed.integer, observed.floating):
            raise TargetError(
                f"ONNX Runtime runs {self.artifact.path} with {dict(as_is.integer + as_is.floating)}, but with its "
                f"quantised tensors as outputs with {dict(observed.integer + observed.floating)}: their codes cannot "
                "be observed."
            )
        return _Observing(session, codes, layers, graph)

    def _feeds(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """Inputs by the names that the file has for them."""
        if len(inputs) != len(self.input_names):
            raise TargetError(
                f"{self.artifact.path} takes {len(self.input_names)} inputs ({', '.join(self.input_names)}), "
                f"not {len(inputs)}."
            )
        try:
            return {name: x.detach().cpu().numpy() for name, x in zip(self.input_names, inputs, strict=True)}
        except TypeError as error:  # bfloat16, which numpy does not know
            raise TargetError(f"ONNX Runtime cannot take these inputs: {error}. Pass float32.") from error

    def _run(self, session: InferenceSession, names: Sequence[str], feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        try:
            values = session.run(list(names), dict(feeds))
        except Exception as error:  # its exceptions share no base class
            given = ", ".join(f"{name}: {x.dtype} {list(x.shape)}" for name, x in feeds.items())
            raise TargetError(f"ONNX Runtime cannot run {self.artifact.path} on {given}: {error}") from error
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def _multiplies(node: onnx.NodeProto) -> bool:
    return node.op_type in INTEGER_OPERATORS | FLOAT_OPERATORS


def _layer_name(node: onnx.NodeProto) -> str:
    """The name that the file has for a node; ONNX Runtime adds to it when it replaces the node."""
    return re.sub(r"(_token_\d+|_nchwc)+$", "", node.name)


def _operator(node: onnx.NodeProto, name: str) -> RuntimeOperator:
    if node.op_type == PACKED_LINEAR:
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        level = settings.get("accuracy_level", 0)
        integer = quantizes_input(settings["bits"], settings["block_size"], level)
        return RuntimeOperator(name, f"{node.op_type} (level {level})", "integer" if integer else "float")
    integer = node.op_type in INTEGER_OPERATORS | {LOOK_UP} or node.op_type.startswith("QLinear")
    return RuntimeOperator(name, node.op_type, "integer" if integer else "float")
