"""What a runtime really runs, for `isogrid inspect`: of an artefact, and of an ONNX file of anybody's making."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto
from rich.table import Table

from isogrid.cli.pictures import histogram
from isogrid.errors import ArtifactError, TargetError
from isogrid.planning.plan import Plan
from isogrid.report import words
from isogrid.targets.onnx_reading import Array, OnnxGraph, attributes, nodes_of, type_name
from isogrid.targets.onnx_runtime_session import STATIC_OPTIONS, operator_counts, optimized_graph
from isogrid.targets.runtime import RuntimeOperator


def operators_table(runtime: str, operators: Sequence[RuntimeOperator], plan: Plan) -> Table:
    """What multiplies: in integers by kind, in float one by one with the plan's reason."""
    table = _table(f"What {runtime} multiplies, as it runs the file")
    counts = Counter(o.operator for o in operators if o.arithmetic == "integer")
    for operator, count in counts.items():
        table.add_row("integer", operator, words.plural(count, "operator"), "")
    reasons = dict(plan.floats)
    for found in operators:
        if found.arithmetic == "float":
            table.add_row("float", found.operator, found.name, reasons.get(found.name, "see the plan"))
    if not operators:
        table.add_row("", "nothing", "", "")
    return table


def onnx_contents(path: Path) -> tuple[tuple[str, ...], tuple[Table, ...]]:
    """Facts and tables of an ONNX file that has no sidecar.

    Raises:
        ArtifactError: it is no ONNX model.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's and the file system's share no base class
        raise ArtifactError(f"{path} is no ONNX model: {type(error).__name__}: {error}.") from error
    if not model.graph.node:
        raise ArtifactError(f"{path} is no ONNX model: there is no operator in it.")
    graph = OnnxGraph(model)
    producer = " ".join(part for part in (model.producer_name, model.producer_version) if part) or "somebody unknown"
    facts = [
        f"{path}: an ONNX model without a sidecar, opset {graph.opset()}, written by {producer}",
        f"{words.size(path.stat().st_size)}, {words.plural(len(graph.nodes), 'operator')}",
    ]
    tables = [table for table in (_weights(graph), _activations(graph)) if table.row_count]
    try:
        tables.append(_as_run(path))
    except TargetError as error:
        facts.append(f"what ONNX Runtime runs cannot be shown: {error}")
    return tuple(facts), tuple(tables)


def _weights(graph: OnnxGraph) -> Table:
    """Constants that are dequantised, with the codes that occur."""
    table = Table(title="Stored weights", title_justify="left")
    for column in ("weight", "shape", "type", "scales"):
        table.add_column(column, overflow="fold")
    table.add_column("codes, from the lowest to the highest")
    for node in nodes_of(graph, "DequantizeLinear"):
        stored = _stored(graph, node.input[0])
        codes, scale = graph.array(stored), graph.array(node.input[1])
        # A bias is as wide as the sums that it is added to: its codes say little.
        if codes is None or scale is None or codes.dtype.itemsize > 2:
            continue
        picture = ""
        if codes.dtype.kind in "iu" or "int" in codes.dtype.name:
            whole = torch.from_numpy(np.array(codes.astype(np.int32)))
            picture = histogram(whole, int(whole.min()), int(whole.max())) if whole.numel() else ""
        kind = type_name(graph.type(stored)).lower()
        table.add_row(stored, words.shape(codes.shape), kind, _granularity(node, scale), picture)
    return table


def _stored(graph: OnnxGraph, name: str) -> str:
    """The stored tensor behind casts and reshapes: codes of few bits are often widened first."""
    while (maker := graph.makers.get(name)) is not None and maker.op_type in ("Cast", "Reshape"):
        name = maker.input[0]
    return name


def _activations(graph: OnnxGraph) -> Table:
    """Tensors that are quantised while the model runs."""
    table = Table(title="Quantised tensors", title_justify="left")
    for column in ("tensor", "type", "scale", "zero point"):
        table.add_column(column, overflow="fold")
    for node in nodes_of(graph, "QuantizeLinear"):
        scale = graph.array(node.input[1])
        zero_point = graph.array(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        kind = type_name(graph.type(node.output[0])).lower()
        table.add_row(node.output[0], kind, _values(scale), _values(zero_point))
    return table


def _as_run(path: Path) -> Table:
    """What ONNX Runtime multiplies on this machine, counted."""
    counts = operator_counts(optimized_graph(path, STATIC_OPTIONS))
    table = _table("What onnxruntime multiplies, as it runs the file")
    for operator, count in counts.integer.items():
        table.add_row("integer", operator, words.plural(count, "operator"), "")
    for name in counts.floating_nodes:
        table.add_row("float", "", name, "no integer kernel has taken its place: see its inputs and its output")
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("arithmetic")
    for column in ("operator", "where", "why"):
        table.add_column(column, overflow="fold")
    return table


def _granularity(node: NodeProto, scale: Array) -> str:
    if scale.size == 1:
        return "1"
    size = attributes(node).get("block_size", 0)
    return f"{scale.size}" + (f", blocks of {size}" if size else f", axis {attributes(node).get('axis', 1)}")


def _values(array: Array | None) -> str:
    if array is None:
        return "computed"
    return f"{array.reshape(-1)[0]:.6g}" if array.size == 1 else f"{array.size} of them"


