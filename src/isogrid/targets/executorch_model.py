"""A .pte file in ExecuTorch's runtime: running it, and looking at what it really does."""

import json
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isogrid.errors import ArtifactError, TargetError
from isogrid.targets.artifact import Artifact
from isogrid.targets.batching import in_batches
from isogrid.targets.runtime import Observed, RuntimeOperator
from isogrid.targets.subprocesses import Worker

MULTIPLYING = frozenset(
    {"XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected", "XNNBatchMatrixMultiply"}
)
MULTIPLYING_KERNELS = ("convolution", "linear", "addmm", "bmm", "mm", "baddbmm")
"""Kernels of ExecuTorch's own, in float, as `aten::mm.out`."""

ARRANGING = frozenset({"XNNStaticTranspose", "XNNStaticReshape"})
"""What stands between channels first and channels last, and more often where more is put out."""


class _Contents(NamedTuple):
    """What a file holds and runs, as read back from it.

    Attributes:
        forward, observe: the operators of both methods.
        tensors: constants, by the names that operators have for them.
    """

    forward: list[dict[str, Any]]
    observe: list[dict[str, Any]]
    tensors: dict[str, Tensor]


class ExecuTorchModel:
    """An artefact in ExecuTorch's runtime; call it with tensors.

    Args:
        artifact: read and checked.
        threads: of XNNPACK; 0 leaves it to ExecuTorch.
    """

    def __init__(self, artifact: Artifact, threads: int = 0):
        self.artifact = artifact
        self.worker = Worker("executorch")
        note = self.worker.call("load", path=str(artifact.path), threads=threads).value
        if note is None:
            raise ArtifactError(f"{artifact.path} was not written by isogrid.export. Export it again.")
        self._note: dict[str, Any] = json.loads(note)
        self.input_names: list[str] = self._note["inputs"]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The model's outputs; raises TargetError where ExecuTorch refuses the inputs."""
        return self._run("forward", inputs)

    def observe(self, *inputs: Tensor) -> Observed:
        """Run as it is, and once more with every quantised tensor in view.

        Raises:
            TargetError: as outputs, these tensors change how ExecuTorch computes.
        """
        as_is, observed = (
            Counter((o["operator"], *o["datatypes"]) for o in operators if o["operator"] not in ARRANGING)
            for operators in (self._contents.forward, self._contents.observe)
        )
        if as_is != observed:
            raise TargetError(
                f"ExecuTorch runs {self.artifact.path} with {dict(as_is)}, but with its quantised tensors as outputs "
                f"with {dict(observed)}: their codes cannot be observed."
            )
        outputs = self._run("forward", inputs)
        seen = self._run("observe", inputs)[len(outputs) :]
        return Observed(outputs, {name: seen[number] for name, number in self._note["codes"].items()}, {})

    def measure(self, *inputs: Tensor, runs: int) -> list[float]:
        """Seconds of each of some runs, as taken in the runtime's own process."""
        tensors = {str(number): x for number, x in enumerate(inputs)}
        seconds: list[float] = self.worker.call("measure", tensors, method="forward", runs=runs).value
        return seconds

    def stored(self) -> Mapping[str, Tensor]:
        """Weight codes, their scales and bias codes of every layer, and all other scales and zero points."""
        found: dict[str, Tensor] = {}
        for name, operator in zip(self._note["layers"], self._layers, strict=True):
            for part, key in operator["constants"].items():
                found[f"{name}.{part}"] = self._contents.tensors[key]
        grids = {tuple(grid) for o in self._contents.forward for grid in o.get("grids", ()) if grid is not None}
        for number, (scale, zero_point) in enumerate(sorted(grids)):
            found[f"grid {number} scale"] = torch.tensor([scale], dtype=torch.float32)
            found[f"grid {number} zero point"] = torch.tensor([zero_point], dtype=torch.int8)
        return found

    def multiplications(self) -> tuple[RuntimeOperator, ...]:
        """The operators that multiply and accumulate, in the order in which ExecuTorch runs them."""
        names = iter(self._note["layers"])
        return tuple(
            _operator(o, next(names) if o in self._layers else "") for o in self._contents.forward if _multiplies(o)
        )

    def producers(self) -> Mapping[str, RuntimeOperator]:
        """For each quantised tensor, the operator that makes its codes."""
        outputs = max((n for o in self._contents.forward for n in o["outputs"]), default=0) + 1
        makers = {number - outputs: o for o in self._contents.observe for number in o["outputs"]}
        codes = self._note["codes"].items()
        return {name: _operator(makers[number], name) for name, number in codes if number in makers}

    @cached_property
    def _layers(self) -> list[dict[str, Any]]:
        """The operators that are the artefact's quantised layers, in order."""
        layers = [o for o in self._contents.forward if _multiplies(o) and _is_integer(o)]
        if len(layers) != len(self._note["layers"]):
            raise TargetError(
                f"ExecuTorch runs {len(layers)} layers of {self.artifact.path} in integers, and "
                f"{len(self._note['layers'])} are quantised: {', '.join(self._note['layers'])}. Keep the others float."
            )
        return layers

    @cached_property
    def _contents(self) -> _Contents:
        answer = self.worker.call("inspect", path=str(self.artifact.path))
        return _Contents(answer.value["forward"], answer.value["observe"], answer.tensors)

    def _run(self, method: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        def run(*batch: Tensor) -> list[Tensor]:
            answer = self.worker.call("run", {str(n): x for n, x in enumerate(batch)}, method=method)
            return [answer.tensors[str(number)] for number in range(answer.value)]

        return in_batches(run, self.artifact, inputs)


def _multiplies(operator: Mapping[str, Any]) -> bool:
    name = operator["operator"]
    return name in MULTIPLYING or name.removeprefix("aten::").partition(".")[0] in MULTIPLYING_KERNELS


def _is_integer(operator: Mapping[str, Any]) -> bool:
    """Whether an operator reads codes."""
    datatypes = operator["datatypes"]
    return bool(datatypes) and datatypes[0].startswith("xnn_datatype_q")


def _operator(operator: Mapping[str, Any], name: str) -> RuntimeOperator:
    # A conversion from float makes codes, and is no arithmetic on them.
    return RuntimeOperator(name, operator["operator"], "integer" if _is_integer(operator) else "float")
