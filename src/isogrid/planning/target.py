"""The protocol a runtime fulfils."""

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from isogrid.formats import Format
from isogrid.planning.graph import Call
from isogrid.planning.rules import Scheme


class Target(Protocol):
    """A runtime: what it can run, how it computes, how its artefact is written and run."""

    @property
    def name(self) -> str:
        """As users write it."""
        ...

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None where the runtime can run the call quantised in this scheme; else why not, for the plan's table."""
        ...

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where a weight or activation format cannot run."""
        ...

    def export(self, integer_model: nn.Module, plan: Any, path: Path) -> Any:
        """Write the artefact and its sidecar; returns an Artifact."""
        ...
