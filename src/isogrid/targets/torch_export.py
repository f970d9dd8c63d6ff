"""`torch.export` programs of `quantized_decomposed` operators: what PyTorch's own tools for deployment take."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from isogrid.errors import ArtifactError, TargetError
from isogrid.formats import Format
from isogrid.layers.arithmetic import quantize_bias
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import Scheme
from isogrid.targets.artifact import Artifact, artifact_for, write_artifact
from isogrid.targets.batching import in_batches
from isogrid.targets.decomposed import decompose
from isogrid.targets.decomposed_writer import QUANTIZE
from isogrid.targets.flat import flat_forward
from isogrid.targets.runtime import Observed, RuntimeOperator
from isogrid.targets.xnnpack import check_static_format

WHAT = "A graph of quantized_decomposed operators"
NOTE = "isogrid.json"
ACTIVATIONS = ("uint8/tensor", "int8/tensor:asymmetric")
"""As Inductor's x86 kernels take them, and as ExecuTorch does."""
KINDS = ("linear", "convolution", "add", "concat", "average_pool")
MULTIPLYING = frozenset({"linear", "conv1d", "conv2d", "conv3d", "convolution", "matmul", "mm", "bmm", "addmm"})


class TorchExport:
    """The target `torch-export`.

    A static scheme becomes a .pt2 file whose layers stand between `dequantize_per_tensor` and `quantize_per_tensor`.
    Torch itself computes it in float; Inductor, ExecuTorch's partitioners and LiteRT's converter put kernels there.
    """

    name = "torch-export"
    kernels = "torch"
    # An ending in float would agree to a rounding only, an ending in codes agrees.
    float_endings: frozenset[str] = frozenset()
    fused_layers: tuple[tuple[str, ...], ...] = ()
    attention = None
    fuses_additions = False

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme itself: uint8 activations, as Inductor's x86 kernels take them."""
        return scheme

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None where the call has this form; else why not."""
        if scheme.arithmetic != "static":
            return f"{WHAT} is written for static schemes only"
        plain = call.kind in KINDS and (call.kind != "add" or call.is_plain_sum)
        return None if plain else f"{call.type} is not written between quantize and dequantize here"

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """None: no dynamic scheme is run."""
        return None

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError where a format has no such form."""
        if kind != "activation":
            check_static_format(kind, fmt, call, WHAT)
        elif str(fmt) not in ACTIVATIONS:
            raise TargetError(
                f"{call.name!r}: {WHAT} has activations as {' or '.join(ACTIVATIONS)}, not {fmt}. Against "
                "overflow on processors without VNNI give weights fewer bits: int7/channel."
            )

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write a .pt2 file, which `torch.export.load` reads, with its sidecar.

        The first dimension of the inputs is that of the plan's example inputs.

        Raises:
            TargetError: the model cannot be traced, or one of its operators has no such form.
        """
        with flat_forward(integer_model, plan.arguments):
            parts = decompose(integer_model, tuple(spec.zeros() for spec in plan.inputs))
        note = {"inputs": [spec.name for spec in plan.inputs], "codes": parts.quantizations, "layers": parts.layers}
        artifact = Artifact(Path(path), self.name, {}, plan, {"torch": torch.__version__}, sha256="")

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                torch.export.save(parts.program, file, extra_files={NOTE: json.dumps(note)})

        return write_artifact(artifact, write)

    def load(self, path: str | Path | Artifact, threads: int = 0) -> "TorchExportModel":
        """A .pt2 file, run by torch as it stands.

        Args:
            path: of the file, or the artefact.
            threads: of torch, for the whole process; 0 leaves them as they are.

        Raises:
            ArtifactError: the file or its sidecar is missing, corrupt or truncated.
        """
        artifact = artifact_for(self.name, path)
        if threads:
            torch.set_num_threads(threads)
        return TorchExportModel(artifact)


class TorchExportModel:
    """A .pt2 file; call it with tensors.

    Args:
        artifact: read and checked.
    """

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        files = {NOTE: ""}
        try:
            self.program = torch.export.load(artifact.path, extra_files=files)
            self._note: dict[str, Any] = json.loads(files[NOTE])
        except Exception as error:  # what torch.export raises shares no base class
            raise ArtifactError(f"torch.export cannot load {artifact.path}: {error}. Export it again.") from error
        self.input_names: list[str] = self._note["inputs"]
        self._module: Any = self.program.module(check_guards=False)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The model's outputs; raises TargetError where shapes do not fit."""
        return in_batches(self._run, self.artifact, inputs)

    def observe(self, *inputs: Tensor) -> Observed:
        """Run with every quantised tensor in view."""
        count = len([node for node in self._module.graph.nodes if node.target is QUANTIZE])

        def run(*batch: Tensor) -> list[Tensor]:
            watcher = _Watcher(self._module)
            with torch.no_grad():
                outputs = watcher.run(*batch)
            return [*_flat(outputs), *watcher.codes]

        everything = in_batches(run, self.artifact, inputs)
        outputs, codes = everything[: len(everything) - count], everything[len(everything) - count :]
        return Observed(outputs, {name: codes[number] for name, number in self._note["codes"].items()}, {})

    def stored(self) -> Mapping[str, Tensor]:
        """The tensors of the file, the codes that its biases stand for, and the scales and zero points in its graph."""
        held = found = dict(self.program.state_dict)
        for name, node in zip(self._note["layers"], self._layers, strict=True):
            x, weight, *bias = node.all_input_nodes
            if bias:
                scales, shift = held[str(weight.args[1].target)], held[str(bias[0].target)]
                found[f"{name}.bias"] = quantize_bias(shift, torch.tensor(x.args[1]), scales)
        for number, node in enumerate(node for node in self._module.graph.nodes if node.target is QUANTIZE):
            found[f"grid {number} scale"] = torch.tensor([node.args[1]], dtype=torch.float32)
            found[f"grid {number} zero point"] = torch.tensor([node.args[2]], dtype=node.args[5])
        return found

    def multiplications(self) -> tuple[RuntimeOperator, ...]:
        """The operators that multiply and accumulate, in order; those between codes count as integer."""
        names = dict(zip(self._layers, self._note["layers"], strict=True))
        return tuple(
            RuntimeOperator(names.get(node, ""), _name(node), "integer" if node in names else "float")
            for node in self._module.graph.nodes
            if _multiplies(node)
        )

    def producers(self) -> Mapping[str, RuntimeOperator]:
        """For each quantised tensor, the operator in front of its quantisation."""
        makers = [node.args[0] for node in self._module.graph.nodes if node.target is QUANTIZE]
        found = {}
        for name, number in self._note["codes"].items():
            maker = makers[number]
            sources = [_name(x) for x in maker.all_input_nodes] if maker.op == "call_function" else []
            arithmetic: Any = "integer" if any("dequantize" in source for source in sources) else "float"
            found[name] = RuntimeOperator(name, _name(maker), arithmetic)
        return found

    @cached_property
    def _layers(self) -> list[Any]:
        """The nodes that multiply what was codes, in order."""
        nodes = [node for node in self._module.graph.nodes if _multiplies(node)]
        return [node for node in nodes if all("dequantize" in _name(x) for x in node.all_input_nodes[:2])]

    def _run(self, *inputs: Tensor) -> list[Tensor]:
        try:
            with torch.no_grad():
                return _flat(self._module(*inputs))
        except Exception as error:
            raise TargetError(f"torch cannot run {self.artifact.path} on these inputs: {error}") from error


class _Watcher(fx.Interpreter):
    """Runs a graph and keeps what its quantisations make."""

    def __init__(self, module: Any):
        super().__init__(module)
        self.codes: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is QUANTIZE:
            self.codes.append(result)
        return result


def _multiplies(node: fx.Node) -> bool:
    return node.op == "call_function" and _name(node) in MULTIPLYING


def _flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return str(getattr(getattr(target, "overloadpacket", target), "__name__", target))
