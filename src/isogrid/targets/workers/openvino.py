"""OpenVINO, in the process and environment that has it."""

import time
from typing import Any

import openvino
import torch

_loaded: dict[str, tuple[Any, list[str]]] = {}


def load(
    tensors: dict[str, torch.Tensor], path: str, options: dict[str, str], observed: list[str], key: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Compile an ONNX file for the CPU and keep it under a key.

    Args:
        tensors: none.
        path: of the file.
        options: properties of the CPU device.
        observed: names of tensors that become outputs too.
        key: for `run`.

    Returns:
        Names of inputs and outputs, and of each operation that runs: name, type, the precision of its first input, and
        the names of the nodes that it was made of.
    """
    core = openvino.Core()
    model = core.read_model(path)
    outputs = [sorted(output.get_names())[0] for output in model.outputs]
    if observed:
        model.add_outputs(observed)
    compiled = core.compile_model(model, "CPU", options)
    _loaded[key] = (compiled, [*outputs, *observed])
    operations = []
    for operation in compiled.get_runtime_model().get_ordered_ops():
        facts = operation.get_rt_info()
        kind, origins = (str(facts[name].value) for name in ("layerType", "originalLayersNames"))
        precision = str(_first(operation).get_rt_info()["outputPrecisions"].value)
        operations.append([operation.get_friendly_name(), kind, precision, origins.split(",")])
    names = [sorted(value.get_names())[0] for value in compiled.inputs]
    return {"inputs": names, "outputs": outputs, "operations": operations, "version": openvino.__version__}, {}


def _first(operation: Any) -> Any:
    """The operation that makes the first input of one; itself where it has none."""
    return operation.input(0).get_source_output().get_node() if operation.get_input_size() else operation


def run(tensors: dict[str, torch.Tensor], key: str) -> tuple[None, dict[str, torch.Tensor]]:
    """Run what `load` has kept under a key, on inputs by name; all outputs by name."""
    compiled, names = _loaded[key]
    results = compiled({name: tensor.numpy() for name, tensor in tensors.items()})
    values = [results[output] for output in compiled.outputs]
    return None, {name: torch.from_numpy(value.copy()) for name, value in zip(names, values, strict=True)}


def measure(
    tensors: dict[str, torch.Tensor], key: str, runs: int, clock: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Seconds of each of some runs, by a function of `time`."""
    now = getattr(time, clock)
    request = _loaded[key][0].create_infer_request()
    feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
    seconds = []
    for _ in range(runs):
        start = now()
        request.infer(feeds)
        seconds.append(now() - start)
    return seconds, {}
