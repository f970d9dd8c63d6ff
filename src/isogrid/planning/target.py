"""What planning asks of a runtime; the rest of the protocol is in `isogrid.targets.runtime`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from isogrid.formats import Format
from isogrid.planning.graph import Call
from isogrid.planning.rules import Scheme


@dataclass(frozen=True)
class StateChoice:
    """How queries, cached keys or cached values of an attention layer are quantised.

    Attributes:
        call: the state, of kind query_states, key_cache or value_cache.
        format: its name.
        rule: what the runtime does in place of the format's own rounding, a key of
            `isogrid.layers.dynamic.ACTIVATION_RULES`, or None.
        reason: for the plan's table, where it is not a rule of the user's alone.
    """

    call: Call
    format: str
    rule: str | None = None
    reason: str = ""


class AttentionFormats(Protocol):
    """What a runtime that keeps a cache can quantise in attention."""

    @property
    def turns_states(self) -> bool:
        """Whether it can turn queries and keys by a Hadamard matrix that the model asks for."""
        ...

    def chosen(self, asked: Mapping[str, StateChoice], states: Sequence[Call]) -> Mapping[str, StateChoice]:
        """What becomes of states, given what rules ask for, by name; raises TargetError where it cannot be done."""
        ...

    def why_float(self, call: Call) -> str:
        """Why a state stays float, and what would change it."""
        ...


class Target(Protocol):
    """A runtime, as far as planning needs to know it: what it can run."""

    @property
    def name(self) -> str:
        """As users write it."""
        ...

    @property
    def kernels(self) -> str:
        """How it computes what runtimes do not agree on: a key of `isogrid.layers.kernels.KERNELS`."""
        ...

    @property
    def float_endings(self) -> frozenset[str]:
        """The kinds of layers whose integer kernel may leave its output in float, where nothing integer reads it."""
        ...

    @property
    def fuses_additions(self) -> bool:
        """Whether an addition is computed inside the layer before it, so that the layer's own output is not rounded."""
        ...

    @property
    def fused_layers(self) -> tuple[tuple[str, ...], ...]:
        """Layers that it computes as one where they are siblings, by the last parts of their names."""
        ...

    @property
    def attention(self) -> AttentionFormats | None:
        """What it can quantise of queries and of its cache; None where it keeps no cache."""
        ...

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme as this runtime stores it: another format of activations, another precision of scales."""
        ...

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None where the runtime can run the call quantised in this scheme; else why not, for the plan's table."""
        ...

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """What the runtime does to the input of a linear layer of a dynamic scheme, whose weight has this format.

        A key of `isogrid.layers.dynamic.ACTIVATION_RULES`; None where activations stay float.
        """
        ...

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where a weight or activation format cannot run."""
        ...
