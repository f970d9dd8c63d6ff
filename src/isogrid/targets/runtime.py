"""What the rest of Isogrid asks of a runtime, whichever it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from isogrid.planning.plan import Plan
from isogrid.planning.target import Target
from isogrid.targets.artifact import Artifact


@dataclass(frozen=True)
class RuntimeOperator:
    """An operator of the graph that a runtime really runs, after its optimisations.

    Attributes:
        name: of the layer or quantised tensor that it computes, as the artefact has it; empty where it has none.
        operator: what the runtime calls it, with the setting that decides its arithmetic.
        arithmetic: of its multiplications and additions.
    """

    name: str
    operator: str
    arithmetic: Literal["integer", "float"]


class Observed(NamedTuple):
    """What a runtime computed on the way.

    Attributes:
        outputs: of the model, as it is deployed wherever the runtime can tell.
        codes: of every quantised tensor, by name.
        layers: input and output of every layer with packed weights and float activations, by the layer's name.
        watched: the model's outputs in the run that put out the codes, where a runtime may fuse otherwise then; None
            where it does not.
        states: queries, keys and values [batch, heads, tokens, size] as attention read them, where the runtime has
            rounded them as they came, by the name of what does so in the reference.
    """

    outputs: list[Tensor]
    codes: dict[str, Tensor]
    layers: dict[str, tuple[Tensor, Tensor]]
    watched: list[Tensor] | None = None
    states: Mapping[str, Tensor] = MappingProxyType({})


class LoadedModel(Protocol):
    """An artefact in its runtime, with the settings that it was trained for; call it with tensors."""

    @property
    def artifact(self) -> Artifact:
        """What was loaded."""
        ...

    @property
    def input_names(self) -> list[str]:
        """The arguments that it takes, in order."""
        ...

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The model's outputs, as tensors on the CPU."""
        ...

    def observe(self, *inputs: Tensor) -> Observed:
        """Run with every quantised tensor, and every layer with packed weights, in view."""
        ...

    def stored(self) -> Mapping[str, Tensor]:
        """The tensors in the file: codes, scales, zero points, by name."""
        ...

    def multiplications(self) -> tuple[RuntimeOperator, ...]:
        """The operators that multiply and accumulate, in order, named after the layers that they compute."""
        ...

    def producers(self) -> Mapping[str, RuntimeOperator]:
        """For each quantised tensor, the operator that makes its codes."""
        ...


class Runtime(Target, Protocol):
    """A target that can also write its artefact and run it."""

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write the artefact of a converted model, and its sidecar; both whole or not at all."""
        ...

    def load(self, path: str | Path | Artifact, threads: int = 0) -> LoadedModel:
        """An artefact, ready to run; raises ArtifactError where the file or its sidecar is missing or corrupt."""
        ...
