"""ONNX Runtime: sessions that compute what was trained, and a look at what they really do."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnxruntime

from isogrid.errors import TargetError
from isogrid.targets.onnx_activations import LOOK_UP
from isogrid.targets.processors import adds_products_in_32_bits

OPTIMIZATIONS = "isogrid.optimizations"
"""An option of our own: with `none` a file runs node by node, as it is written."""

STATIC_OPTIONS = {"session.x64quantprecision": "1"}
"""For integer kernels: without it, x86 without VNNI adds pairs of products in int16, which overflows.

It makes unsigned weights of signed ones, for which ONNX Runtime has slower kernels, on any x86 processor.
"""

WEIGHT_ONLY_OPTIONS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Keeps activations in float where ONNX Runtime itself turns a dequantised weight into a MatMulNBits."""

INTEGER_OPERATORS = {
    "ConvInteger",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
FLOAT_OPERATORS = {
    "Attention",
    "Conv",
    "ConvTranspose",
    "Einsum",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "GRU",
    "Gemm",
    "GroupQueryAttention",
    "LSTM",
    "MatMul",
    "MultiHeadAttention",
    "NhwcFusedConv",
    "RNN",
}


@dataclass(frozen=True)
class OperatorCounts:
    """How often each operator occurs in a graph.

    Attributes:
        integer: operators that multiply and accumulate on codes; MatMulNBits counts here at every accuracy level.
        floating: operators that multiply and accumulate in floating point.
        other: the rest.
        floating_nodes: the names of the nodes behind `floating`.
    """

    integer: Counter[str] = field(default_factory=Counter)
    floating: Counter[str] = field(default_factory=Counter)
    other: Counter[str] = field(default_factory=Counter)
    floating_nodes: tuple[str, ...] = ()


def open_session(path: str | Path, options: Mapping[str, str], threads: int = 0) -> onnxruntime.InferenceSession:
    """A session on the CPU with all of ONNX Runtime's optimisations.

    Args:
        path: the ONNX file.
        options: session configuration entries, such as STATIC_OPTIONS.
        threads: within an operator; 0 leaves it to ONNX Runtime.

    Raises:
        TargetError: ONNX Runtime cannot load the file.
    """
    session_options = _session_options(options)
    session_options.intra_op_num_threads = threads
    return _session(path, session_options)


def options_here(options: Mapping[str, str], vnni: bool | None = None) -> dict[str, str]:
    """The options of an artefact that its exactness needs on this processor; the others would only slow it down.

    Args:
        options: those that give the same codes on every processor.
        vnni: whether u8 x s8 products are summed in 32 bits; None asks the processor.

    >>> options_here({**STATIC_OPTIONS, **WEIGHT_ONLY_OPTIONS}, vnni=True) == WEIGHT_ONLY_OPTIONS
    True
    """
    exact = adds_products_in_32_bits() if vnni is None else vnni
    return {name: value for name, value in options.items() if not (exact and name in STATIC_OPTIONS)}


def optimized_graph(path: str | Path, options: Mapping[str, str]) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs: after its optimisations for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        session_options = _session_options(options)
        session_options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        _session(path, session_options)
        return onnx.load(session_options.optimized_model_filepath)


CODE_TYPES = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)


def quantized_tensors(model: onnx.ModelProto) -> list[str]:
    """Names of the tensors of codes; weights are stored as codes and not among them.

    They are what QuantizeLinear makes, clipped if it is, and what is looked up in tables, as the Reshape leaves it.
    """
    tables = {tensor.name for tensor in model.graph.initializer if tensor.data_type in CODE_TYPES}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    quantized: list[str] = []
    looked_up: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            quantized.append(node.output[0])
        elif node.op_type == LOOK_UP and node.input[0] in tables:
            looked_up.add(node.output[0])
        elif looked_up.intersection(node.input):
            quantized.append(node.output[0])
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    return [_narrowed(codes, consumers.get(codes, [])) for codes in quantized]


def _narrowed(codes: str, consumers: list[onnx.NodeProto]) -> str:
    clipped = len(consumers) == 1 and consumers[0].op_type == "Clip"
    return str(consumers[0].output[0]) if clipped else codes


def operator_counts(model: onnx.ModelProto) -> OperatorCounts:
    """Operators of a graph by how they multiply and accumulate, subgraphs included.

    >>> from onnx import TensorProto, helper
    >>> x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    >>> graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"], name="square")], "", [x], [y])
    >>> operator_counts(helper.make_model(graph)).floating_nodes
    ('square',)
    """
    nodes = list(_nodes(model.graph))
    kinds = [node.op_type for node in nodes]
    floating = [node for node in nodes if node.op_type in FLOAT_OPERATORS]
    return OperatorCounts(
        integer=Counter(kind for kind in kinds if kind in INTEGER_OPERATORS),
        floating=Counter(node.op_type for node in floating),
        other=Counter(kind for kind in kinds if kind not in INTEGER_OPERATORS | FLOAT_OPERATORS),
        floating_nodes=tuple(node.name for node in floating),
    )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in [attribute.g, *attribute.graphs]:
                yield from _nodes(subgraph)


def _session_options(options: Mapping[str, str]) -> onnxruntime.SessionOptions:
    session_options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    as_written = options.get(OPTIMIZATIONS) == "none"
    session_options.graph_optimization_level = levels.ORT_DISABLE_ALL if as_written else levels.ORT_ENABLE_ALL
    session_options.log_severity_level = 3
    for name, value in options.items():
        if name != OPTIMIZATIONS:
            session_options.add_session_config_entry(name, value)
    return session_options


def _session(path: str | Path, session_options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    providers: Iterable[str] = ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), session_options, providers=providers)
    except Exception as error:  # its exceptions share no base class
        raise TargetError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from error
