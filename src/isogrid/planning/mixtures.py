"""Mixtures of types: which layers of a language model llama.cpp stores finer than others, and what it falls back to.

Written after `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama-quant.cpp, llama.cpp of llama-cpp-python
0.3.36, without its exceptions for Falcon and GLM-5, and without importance matrices.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from isogrid.errors import PlanError
from isogrid.formats import named_format
from isogrid.formats.ggml import block_length
from isogrid.planning.roles import Role, Weight, block_of, role_of, tied_embeddings


class Assigned(NamedTuple):
    """What a mixture stores a layer in.

    Attributes:
        weight: the format.
        reason: what follows the scheme's name in the plan; empty where the layer is stored as most are.
        instead_of: the format that did not fit the layer's rows, where that is why.
    """

    weight: str
    reason: str = ""
    instead_of: str = ""


@dataclass(frozen=True)
class Position:
    """Where a layer stands.

    Attributes:
        index, count: which it is among the layers of its role, and of how many: as many as the model has blocks.
        sharing: how many query heads share a key and value head.
        blocks, experts: of the model.
    """

    index: int
    count: int
    sharing: int
    blocks: int = 0
    experts: int = 1

    @property
    def takes_more_bits(self) -> bool:
        """The first and the last eighth of the blocks, and every third between them."""
        eighth = self.count // 8
        return self.index < eighth or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2

    @property
    def is_large(self) -> bool:
        """Whether the model is of 80 blocks and its values are shared, as Llama's and Qwen's of 70 billion are."""
        return self.blocks == 80 and self.sharing > 1

    @property
    def is_early(self) -> bool:
        """The first eighth of the blocks."""
        return self.index < self.count // 8


Choose = Callable[[Position], str | None]


def _always(weight: str) -> Choose:
    return lambda position: weight


def _more_bits(weight: str) -> Choose:
    return lambda position: weight if position.takes_more_bits else None


def _early(weight: str) -> Choose:
    return lambda position: weight if position.is_early else None


def _first(count: int, weight: str, others: str | None = None) -> Choose:
    return lambda position: weight if position.index < count else others


def _shared(weight: str, others: str | None = None) -> Choose:
    """Where four query heads or more share a value, whose layer is small then."""
    return lambda position: weight if position.sharing >= 4 else others


@dataclass(frozen=True)
class Mixture:
    """Types by role.

    Attributes:
        base: of all layers that nothing else is said about.
        finer: type by role; the values' choice holds for fused queries, keys and values as well.
        embedding: of token embeddings, where it is another than the base.
        output: of the output layer, and of embeddings that are one with it; None for the base.
        eight: of attention outputs in models of eight experts; None for the base.
    """

    base: str
    finer: Mapping[Role, Choose]
    embedding: str | None = None
    output: str | None = "q6_k"
    eight: str | None = None


def _mixture(
    base: str,
    embedding: str | None = None,
    output: str | None = "q6_k",
    eight: str | None = None,
    **finer: Choose,
) -> Mixture:
    roles: dict[Role, Choose] = finer  # type: ignore[assignment]
    return Mixture(base, roles, embedding, output, eight)


def _sixteenth(position: Position) -> str:
    return "q5_k" if position.index < position.count // 16 else "q4_k"


MIXTURES: dict[str, Mixture] = {
    **{name: _mixture(name) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q6_k", "q1_0")},
    "q8_0": _mixture("q8_0", output=None),
    **{name: _mixture(name, embedding="q4_k") for name in ("tq1_0", "tq2_0", "q2_0")},
    "iq4_nl": _mixture("iq4_nl", eight="q5_k", attention_v=_shared("q5_k"), ffn_down=_early("q5_k")),
    "q2_k": _mixture(
        "q2_k",
        eight="q5_k",
        attention_v=_shared("q4_k", "q3_k"),
        ffn_down=_always("q3_k"),
        attention_output=_always("q3_k"),
    ),
    "q2_k_s": _mixture("q2_k", attention_v=_shared("q4_k"), ffn_down=_early("q4_k")),
    "q3_k_s": _mixture("q3_k", eight="q5_k"),
    "q3_k_m": _mixture(
        "q3_k",
        eight="q5_k",
        attention_v=_first(2, "q5_k", "q4_k"),
        ffn_down=_sixteenth,
        attention_output=_always("q4_k"),
    ),
    "q3_k_l": _mixture(
        "q3_k", attention_v=_always("q5_k"), ffn_down=_always("q5_k"), attention_output=_always("q5_k")
    ),
    "q4_k_s": _mixture("q4_k", eight="q5_k", attention_v=_first(4, "q5_k"), ffn_down=_early("q5_k")),
    "q4_k_m": _mixture("q4_k", eight="q5_k", attention_v=_more_bits("q6_k"), ffn_down=_more_bits("q6_k")),
    "q5_k_s": _mixture("q5_k"),
    "q5_k_m": _mixture("q5_k", attention_v=_more_bits("q6_k"), ffn_down=_more_bits("q6_k")),
    # In the manner of Unsloth's dynamic files, whose own choices are made model by model: values and both ends in 6
    # bits, what writes to the residual stream in 5, and in 6 where llama.cpp gives more bits.
    "ud-q4_k_xl": _mixture(
        "q4_k",
        embedding="q6_k",
        attention_v=_always("q6_k"),
        attention_k=_always("q5_k"),
        attention_output=_always("q5_k"),
        ffn_down=lambda position: "q6_k" if position.takes_more_bits else "q5_k",
    ),
}
"""By the names of llama-quantize, lower case."""

FALLBACKS = {
    **dict.fromkeys(("q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
"""What stores rows that a type's blocks do not divide; where these do not either, and for types of 32, float16."""


_VALUES: tuple[Role, ...] = ("attention_v", "attention_qkv")
"""Counted together, and stored alike."""


def assign(mixture: str | None, base: str, weights: Sequence[Weight]) -> dict[str, Assigned]:
    """What each layer is stored in, by its path.

    Args:
        mixture: a key of MIXTURES, or None for `base` everywhere, which then only falls back.
        base: the scheme's format.
        weights: of all layers, in the order of the model's forward.

    Raises:
        PlanError: there is no such mixture.
    """
    if mixture is None:
        return {weight.path: _fitting(Assigned(base), weight) for weight in weights}
    if mixture not in MIXTURES:
        raise PlanError(f"Unknown mixture {mixture!r}. Known: {', '.join(MIXTURES)}.")
    known, tied = MIXTURES[mixture], tied_embeddings(weights)
    roles = {weight.path: role_of(weight, tied) for weight in weights}
    blocks = len({block_of(weight.path) for weight in weights} - {None})
    values = sum(role in _VALUES for role in roles.values())
    sharing, experts = _sharing(roles, weights), max((weight.experts for weight in weights), default=1)
    seen: dict[Role, int] = {}
    found = {}
    for weight in weights:
        role = roles[weight.path]
        counter: Role = "attention_v" if role in _VALUES else role
        index = seen[counter] = seen.get(counter, -1) + 1
        if experts > 1 and role == "ffn_down":  # of which a block may have several
            index = block_of(weight.path) or 0
        position = Position(index, values if role in _VALUES else blocks, sharing, blocks, experts)
        found[weight.path] = _fitting(_of_role(known, role, position, weight, tied), weight)
    return found


def _of_role(known: Mixture, role: Role, position: Position, weight: Weight, tied: frozenset[str]) -> Assigned:
    if role == "output" or weight.owner in tied:
        if known.output is None:
            return Assigned(known.base)
        fits = not weight.shape[-1] % (block_length(named_format(known.base)) or 1)
        what = "the output layer" if role == "output" else "the output layer's weight"
        return Assigned(known.output, what) if fits else Assigned("q8_0", f"{what}, which {known.base} does not fit")
    if role == "embedding":
        return Assigned(known.embedding, "token embeddings") if known.embedding else Assigned(known.base)
    choose = known.finer.get("attention_v" if role in _VALUES else role)
    chosen = None if choose is None else choose(position)
    words = f"{role.replace('_', ' ')}, block {position.index}"
    if position.is_large and role in _VALUES and (chosen or known.base) in ("q3_k", "q4_k"):
        chosen = "q5_k"
    if position.experts == 8 and role in (*_VALUES, "attention_k", "attention_output"):
        chosen, words = known.eight if role == "attention_output" else "q8_0", f"{words}, of eight experts"
    return Assigned(known.base) if chosen is None else Assigned(chosen, words)


def _sharing(roles: Mapping[str, Role], weights: Iterable[Weight]) -> int:
    """Query heads that share a value head: what the layers' outputs say, 1 where these are not told apart."""
    outputs: dict[Role, int] = {}
    for weight in weights:
        outputs.setdefault(roles[weight.path], weight.shape[0])
    if "attention_q" not in outputs or "attention_v" not in outputs:
        return 1
    return outputs["attention_q"] // outputs["attention_v"]


def _fitting(assigned: Assigned, weight: Weight) -> Assigned:
    """The format, or what llama.cpp falls back to where a row is no whole number of blocks."""
    length = block_length(named_format(assigned.weight))
    columns = weight.shape[-1]
    if length is None or not columns % length:
        return assigned
    second = FALLBACKS.get(assigned.weight, "float16")
    if columns % (block_length(named_format(second)) or 1):
        second = "float16"
    because = f"{assigned.weight} holds {length} values of a row and {columns} are no multiple, so {second}"
    reason = f"{assigned.reason}; {because}" if assigned.reason else because
    return Assigned(second, reason, instead_of=assigned.weight)
