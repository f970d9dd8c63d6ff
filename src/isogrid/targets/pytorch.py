"""PyTorch itself: schemes that no runtime has kernels for, computed by `isogrid.convert(model)`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from torch import nn

from isogrid.errors import TargetError
from isogrid.formats import Format, named_format
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.rules import Scheme
from isogrid.planning.target import AttentionFormats, StateChoice
from isogrid.targets.artifact import Artifact


class AnyStates:
    """Queries, keys and values in any format: what PyTorch's caches hold are tensors like others."""

    turns_states = True

    def chosen(self, asked: Mapping[str, StateChoice], states: Sequence[Call]) -> Mapping[str, StateChoice]:
        """What was asked for."""
        return asked

    def why_float(self, call: Call) -> str:
        """No rule names it."""
        return f"no rule names it; match={call.kind!r} with activation= quantises it"


class PyTorch:
    """The target `pytorch`.

    Linear layers, embeddings and experts are stored in any format; the scheme `bitnet` computes as it was published.
    There is no file beside Isogrid's own: `isogrid.save` keeps the model, and `isogrid.convert` is what computes.
    """

    name = "pytorch"
    kernels = "float"
    float_endings: frozenset[str] = frozenset()
    fused_layers: tuple[tuple[str, ...], ...] = ()
    attention: AttentionFormats = AnyStates()
    fuses_additions = False

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme itself; raises TargetError for static ones, whose arithmetic is always a runtime's."""
        if scheme.arithmetic == "static":
            raise TargetError(
                f"Scheme {scheme.name} is static: its integers are those of a runtime. Use target='onnxruntime'."
            )
        return scheme

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None for linear layers, experts and embeddings."""
        known = call.kind in ("linear", "experts", "embedding")
        return None if known else f"only linear layers and embeddings are stored, and this is {call.type}"

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """int8 tokens for BitNet's weights; nothing for others."""
        return "bitnet" if weight == named_format("bitnet") else None

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError for formats of activations."""
        if kind == "activation":
            raise TargetError(f"{call.name!r}: the target pytorch leaves activations to the scheme; drop {fmt}.")

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> NoReturn:
        """There is nothing to write; raises TargetError."""
        raise TargetError(
            "The target pytorch has no file format. Keep the model with isogrid.save(model, folder), compute with "
            "isogrid.convert(model), or plan for a runtime, such as target='llamacpp'."
        )

    def load(self, path: str | Path | Artifact, threads: int = 0) -> NoReturn:
        """There is nothing to load; raises TargetError."""
        raise TargetError("The target pytorch has no file format. Read the model with isogrid.restore(model, folder).")
