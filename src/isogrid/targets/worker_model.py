"""An artefact in a runtime of its own process: running it, and looking at what it really does."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isogrid.errors import ArtifactError, TargetError
from isogrid.targets.artifact import Artifact
from isogrid.targets.batching import in_batches
from isogrid.targets.runtime import Observed, RuntimeOperator
from isogrid.targets.subprocesses import Worker


@dataclass(frozen=True)
class Vocabulary:
    """The words of a runtime.

    Attributes:
        runtime: name of its worker.
        multiplying: operators that multiply and accumulate, by the part of their name before a dot.
        arranging: operators that change the order in memory only, of which there are more where more is put out.
        codes: what the datatypes of codes begin with.
    """

    runtime: str
    multiplying: frozenset[str]
    arranging: frozenset[str]
    codes: str

    def multiplies(self, operator: Mapping[str, Any]) -> bool:
        """Whether an operator multiplies and accumulates."""
        return operator["operator"].partition(".")[0] in self.multiplying

    def is_integer(self, operator: Mapping[str, Any]) -> bool:
        """Whether an operator reads codes. One that makes them of float values is no arithmetic on them."""
        datatypes = operator["datatypes"]
        return bool(datatypes) and datatypes[0].startswith(self.codes)

    def named(self, operator: Mapping[str, Any], name: str) -> RuntimeOperator:
        """An operator as verification takes it."""
        return RuntimeOperator(name, operator["operator"], "integer" if self.is_integer(operator) else "float")


class _Contents(NamedTuple):
    """What a file holds and runs, as read back from it.

    Attributes:
        forward, observe: the operators of both methods.
        tensors: constants, by the names that operators have for them.
    """

    forward: list[dict[str, Any]]
    observe: list[dict[str, Any]]
    tensors: dict[str, Tensor]


class WorkerModel:
    """An artefact with two methods, `forward` and `observe`, in its runtime; call it with tensors.

    Args:
        artifact: read and checked.
        words: of the runtime.
        threads: of the runtime; 0 leaves it to it.
    """

    def __init__(self, artifact: Artifact, words: Vocabulary, threads: int = 0):
        self.artifact, self.words = artifact, words
        self.worker = Worker(words.runtime)
        note = self.worker.call("load", path=str(artifact.path), threads=threads).value
        if note is None:
            raise ArtifactError(f"{artifact.path} was not written by isogrid.export. Export it again.")
        self.note: dict[str, Any] = json.loads(note)
        self.input_names: list[str] = self.note["inputs"]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The model's outputs; raises TargetError where the runtime refuses the inputs."""
        return self._run("forward", inputs)

    def observe(self, *inputs: Tensor) -> Observed:
        """Run as it is, and once more with every quantised tensor in view.

        Raises:
            TargetError: as outputs, these tensors change how the runtime computes.
        """
        as_is, observed = (
            Counter((o["operator"], *o["datatypes"]) for o in operators if o["operator"] not in self.words.arranging)
            for operators in (self._contents.forward, self._contents.observe)
        )
        if as_is != observed:
            raise TargetError(
                f"{self.words.runtime} runs {self.artifact.path} with {dict(as_is)}, but with its quantised tensors "
                f"as outputs with {dict(observed)}: their codes cannot be observed."
            )
        outputs = self._run("forward", inputs)
        seen = self._run("observe", inputs)[len(outputs) :]
        layers = {name: (seen[x], seen[y]) for name, (x, y) in self.note["packed"].items()}
        return Observed(outputs, {name: seen[number] for name, number in self.note["codes"].items()}, layers)

    def measure(self, *inputs: Tensor, runs: int, clock: str = "perf_counter") -> list[float]:
        """Seconds of each of some runs, as a function of `time` counts them in the runtime's own process."""
        tensors = {str(number): x for number, x in enumerate(self.entering(inputs))}
        seconds: list[float] = self.worker.call("measure", tensors, method="forward", runs=runs, clock=clock).value
        return seconds

    def stored(self) -> Mapping[str, Tensor]:
        """Weight codes, their scales and bias codes of every layer, and all other scales and zero points."""
        found: dict[str, Tensor] = {}
        for name, operator in zip(self.note["layers"], self._layers, strict=True):
            for part, key in operator["constants"].items():
                found[f"{name}.{part}"] = self._contents.tensors[key]
        grids = {tuple(grid) for o in self._contents.forward for grid in o.get("grids", ()) if grid is not None}
        for number, (scale, zero_point) in enumerate(sorted(grids)):
            found[f"grid {number} scale"] = torch.tensor([scale], dtype=torch.float32)
            found[f"grid {number} zero point"] = torch.tensor([zero_point], dtype=torch.int8)
        return found

    def multiplications(self) -> tuple[RuntimeOperator, ...]:
        """The operators that multiply and accumulate, in the order in which the runtime runs them."""
        names = iter(self.note["layers"])
        return tuple(
            self.words.named(o, next(names) if o in self._layers else "")
            for o in self._contents.forward
            if self.words.multiplies(o)
        )

    def producers(self) -> Mapping[str, RuntimeOperator]:
        """For each quantised tensor, the operator that makes its codes."""
        outputs = max((n for o in self._contents.forward for n in o["outputs"]), default=0) + 1
        makers = {number - outputs: o for o in self._contents.observe for number in o["outputs"]}
        codes = self.note["codes"].items()
        return {name: self.words.named(makers[number], name) for name, number in codes if number in makers}

    def entering(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The model's inputs as the file takes them."""
        return list(inputs)

    def leaving(self, outputs: list[Tensor]) -> list[Tensor]:
        """The model's outputs of what the file puts out; further outputs are codes and stay so."""
        return outputs

    @cached_property
    def _layers(self) -> list[dict[str, Any]]:
        """The operators that are the artefact's quantised layers, in order."""
        layers = [o for o in self._contents.forward if self.words.multiplies(o) and self.words.is_integer(o)]
        if len(layers) != len(self.note["layers"]):
            raise TargetError(
                f"{self.words.runtime} runs {len(layers)} layers of {self.artifact.path} in integers, and "
                f"{len(self.note['layers'])} are quantised: {', '.join(self.note['layers'])}. Keep the others float."
            )
        return layers

    @cached_property
    def _contents(self) -> _Contents:
        answer = self.worker.call("inspect", path=str(self.artifact.path))
        return _Contents(answer.value["forward"], answer.value["observe"], answer.tensors)

    def _run(self, method: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        def run(*batch: Tensor) -> list[Tensor]:
            entering = self.entering(batch)
            answer = self.worker.call("run", {str(n): x for n, x in enumerate(entering)}, method=method)
            return self.leaving([answer.tensors[str(number)] for number in range(answer.value)])

        return in_batches(run, self.artifact, inputs)
