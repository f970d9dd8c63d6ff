"""llama.cpp's key-value cache: the types that it stores keys and values in, and the options that ask for them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from isogrid.errors import TargetError
from isogrid.layers.attention_states import ATTRIBUTE, KEY, QUERY, VALUE
from isogrid.layers.dynamic import activation_rule
from isogrid.layers.llamacpp_cache import ROTATIONS, STORED, plain, restored, rotation_of, stored_in
from isogrid.planning.graph import Call
from isogrid.planning.plan import Plan
from isogrid.planning.target import StateChoice
from isogrid.targets.artifact import Artifact

KEYS = ("q8_0", "q5_0", "q4_0")
VALUES = tuple(STORED)
PAIRED = {
    "LlamaAttention": True,
    "MistralAttention": True,
    "MixtralAttention": True,
    "Qwen2Attention": False,
    "Qwen3Attention": False,
    "Qwen3MoeAttention": False,
    "Phi3Attention": False,
    "Gemma2Attention": False,
    "Gemma3Attention": False,
    "GPT2Attention": False,
}
"""Whether files have the rows of queries and keys in pairs, by the class of the attention layer in transformers."""


class CacheTypes:
    """What llama.cpp stores keys and values in, beside float32: one type for all keys, one for all values."""

    turns_states = False  # as a model asks for; heads of whole 64 channels it turns by itself

    def chosen(self, asked: Mapping[str, StateChoice], states: Sequence[Call]) -> Mapping[str, StateChoice]:
        """What was asked for by llama.cpp's own rules, and the queries.

        Raises:
            TargetError: a type is not known, or not all layers have the same, or only one of keys and values is asked.
        """
        for kind, known in ((KEY, KEYS), (VALUE, VALUES)):
            _check(kind, known, [choice for choice in asked.values() if choice.call.kind == kind], states)
        for choice in asked.values():
            if choice.call.kind == QUERY:
                raise TargetError(
                    f"{choice.call.name!r}: llama.cpp quantises queries as the type of the keys has it. Leave the rule "
                    "out."
                )
        kinds = {choice.call.kind for choice in asked.values()}
        if len({KEY, VALUE} & kinds) == 1:
            raise TargetError(
                "llama.cpp computes with quantised values in flash attention, which rounds what is float to float16: "
                "quantise keys and values, by match='key_cache' and match='value_cache', or neither."
            )
        found = {}
        for call in states:
            if call.name in asked:
                found[call.name] = _decided(asked[call.name])
            elif call.kind == QUERY and KEY in kinds:
                found[call.name] = _decided(StateChoice(call, "q8_0", reason="what llama.cpp multiplies keys by"))
        return found

    def why_float(self, call: Call) -> str:
        """No rule names it."""
        if call.kind == QUERY:
            return "queries follow the keys of the cache"
        return f"no rule names it: the cache is float32; match={call.kind!r} with activation='q8_0' quantises it"


def cache_options(plan: Plan) -> dict[str, str]:
    """How llama.cpp has to be run to compute what was trained, as its command line calls the settings.

    A cache in float16, which is its default, would round what nobody trained.
    """
    kinds = {state.kind: plan.site(state.site).format for state in plan.states}
    flash = "on" if VALUE in kinds else "off"
    return {"type_k": kinds.get(KEY, "f32"), "type_v": kinds.get(VALUE, "f32"), "flash_attn": flash}


def attention_states(artifact: Artifact, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values [rows, heads, tokens, size] as flash attention read them, in the model's order.

    Args:
        artifact: that was run.
        tensors: of the worker's function `run`.
    """
    found = {}
    paths = list(dict.fromkeys(state.path for state in artifact.plan.states))
    types = {KEY: artifact.session_options["type_k"], VALUE: artifact.session_options["type_v"]}
    for state in artifact.plan.states:
        rule = activation_rule(str(state.rule))
        name = f"attention{paths.index(state.path)}.{state.kind.partition('_')[0]}"
        if state.kind == QUERY:
            query, layer = tensors[name], name.partition(".")[0]
            stored = plain(rule).values(query.reshape(-1, 32)).reshape(query.shape)
            # Gemma's queries are scaled before attention, not in it: by a power of two, which changes no code.
            stored = stored * (tensors[f"{layer}.scale"][0] * query.shape[-1] ** 0.5)
        else:
            stored = decoded(tensors[name], types[state.kind])
        found[f"{state.path}.{ATTRIBUTE}.{state.kind}"] = restored(rule, stored)
    return found


def decoded(packed: Tensor, type_: str) -> Tensor:
    """Values float32 [..., size] of the rows of a cache, uint8 [..., bytes]."""
    import gguf

    rows = packed.reshape(-1, packed.shape[-1]).numpy()
    values = torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type_.upper()]))
    return values.reshape(*packed.shape[:-1], -1)


def _decided(choice: StateChoice) -> StateChoice:
    """A choice with llama.cpp's rule."""
    call = choice.call
    rotation = rotation_of(call.kind, call.shape[-1])
    reasons = [choice.reason, f"rotated by {rotation} values, as llama.cpp does" if rotation else ""]
    rule = stored_in(choice.format, call.kind, call.shape[-1], PAIRED[call.type]).name
    return replace(choice, rule=rule, reason=", ".join(filter(None, reasons)))


def _check(kind: str, known: Sequence[str], choices: Sequence[StateChoice], states: Sequence[Call]) -> None:
    for choice in choices:
        if choice.format not in known:
            why = ", whose products take sums that are stored apart" if choice.format in VALUES else ""
            raise TargetError(
                f"{choice.call.name!r}: llama.cpp's cache is trained in {', '.join(known)}, and not in "
                f"{choice.format}{why}."
            )
        size = choice.call.shape[-1]
        if size % 32 or size > ROTATIONS[-1]:
            raise TargetError(
                f"{choice.call.name!r}: heads of {size} values have no blocks of 32, or exceed {ROTATIONS[-1]}."
            )
        if choice.call.type not in PAIRED:
            raise TargetError(
                f"{choice.call.name!r}: the order in which llama.cpp keeps the values of a head is known of "
                f"{', '.join(PAIRED)}, not of {choice.call.type}. Keep its cache float."
            )
    formats = sorted({choice.format for choice in choices})
    names = {choice.call.name for choice in choices}
    missing = [call.name for call in states if call.kind == kind and call.name not in names]
    if len(formats) > 1 or (choices and missing):
        asked = " and ".join([*formats, *(["float"] if missing else [])])
        raise TargetError(f"llama.cpp's cache has one type for all layers, and rules ask for {asked}: match={kind!r}.")
