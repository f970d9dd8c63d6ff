"""The runtime's own graph: which arithmetic it chose for every layer."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from isogrid.layers.integer import IntegerLayer, PackedLinear
from isogrid.planning.plan import Plan
from isogrid.targets import Artifact
from isogrid.targets.onnx_runtime_session import FLOAT_OPERATORS, INTEGER_OPERATORS, optimized_graph
from isogrid.verification.report import GraphCheck

FLOAT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_graph(
    reference: nn.Module, artifact: Artifact, plan: Plan, inputs: tuple[Any, ...]
) -> tuple[GraphCheck, ...]:
    """For each layer that multiplies: the operator that ONNX Runtime runs, and whether that was planned.

    A quantised layer must run in integer arithmetic, under its own name. Operators that multiply and belong to no layer
    are listed too; they hold only where nothing was quantised into them.

    Args:
        reference: of `isogrid.convert`.
        artifact: an ONNX file.
        plan: of the model.
        inputs: one batch, to count multiplications.
    """
    nodes = _multiplying_nodes(optimized_graph(artifact.path, artifact.session_options))
    planned = {layer.path for layer in plan.layers}
    # MatMulNBits reads integer weights everywhere, but multiplies in float where activations are float.
    float_by_plan = {layer.path for layer in plan.layers if layer.arithmetic == "weight_only"}
    checks = []
    for path, macs in _macs(reference, inputs).items():
        operator = nodes.pop(path, "nothing of its name")
        arithmetic = "integer" if operator in INTEGER_OPERATORS else "float"
        holds = arithmetic == "integer" or path not in planned
        if path in float_by_plan:
            arithmetic = "float"
        checks.append(GraphCheck(path, operator, arithmetic, macs, holds))
    for name, operator in nodes.items():
        arithmetic = "integer" if operator in INTEGER_OPERATORS else "float"
        checks.append(GraphCheck(name or "(unnamed)", operator, arithmetic, 0, True))
    return tuple(checks)


def _multiplying_nodes(model: onnx.ModelProto) -> dict[str, str]:
    """Operators that multiply and accumulate, by the name of the layer they come from."""
    return {
        re.sub(r"(_token_\d+|_nchwc)+$", "", node.name): node.op_type
        for node in model.graph.node
        if node.op_type in INTEGER_OPERATORS | FLOAT_OPERATORS
    }


def _macs(reference: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Multiplications with accumulation of each layer for one example."""
    with _counting(reference) as found, torch.no_grad():
        reference(*inputs)
    return found


@contextmanager
def _counting(reference: nn.Module) -> Iterator[dict[str, int]]:
    found: dict[str, int] = {}
    layers = {
        name: module
        for name, module in reference.named_modules()
        if isinstance(module, (IntegerLayer, PackedLinear, *FLOAT_LAYERS))
    }

    def hook(name: str) -> Any:
        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = found.get(name, 0) + output.numel() // max(1, len(output)) * _products(module)

        return count

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _products(module: Any) -> int:
    """Products in one sum of a layer."""
    if isinstance(module, PackedLinear):
        return module.weight.shape[1] * module.block
    return prod(module.weight.shape[1:])
