"""Rules and schemes: which formats a user asks for, where."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Literal

from isogrid.errors import PlanError
from isogrid.formats import named_format
from isogrid.planning.graph import COMPUTING_KINDS, JOINING_KINDS, Graph
from isogrid.quantizers.estimators import estimator_from_name
from isogrid.quantizers.ranges import range_from_name

ScaleChoice = Literal["learned", "frozen", "moving", "dynamic"]
FloatArithmetic = Literal["weight_only", "float"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What to do with the layers and operations that a pattern matches. The first rule that matches wins.

    Args:
        match: a name with wildcards (`layer1.*.conv2`), a class name (`Conv2d`), a kind (`add`, `key_cache`), or, after
            `re:`, a regular expression that must match the whole name.
        keep: "float" leaves the layer as it is; nothing else may then be given.
        weight: format of the weight.
        activation: format of inputs and outputs; of queries, cached keys and values where it matches these alone.
        scale: `learned`, `frozen`, `moving` or `dynamic`, for weights and activations alike.
        estimator: `ste`, `identity`, `lsq`, or `efficientqat`, which learns zero points too.
        range: how scales are chosen from data, such as `mse`, `absmax` or `percentile(99.9)`.

    What is not given comes from the scheme.

    >>> Rule(match="fc", weight="int8/channel").matches("fc", "Linear", "linear")
    True
    """

    match: str
    keep: Literal["float"] | None = None
    weight: str | None = None
    activation: str | None = None
    scale: ScaleChoice | None = None
    estimator: str | None = None
    range: str | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if f.name not in ("match", "keep") and getattr(self, f.name) is not None]
        if self.keep is not None and given:
            raise PlanError(
                f"The rule for {self.match!r} keeps the layer in float, so {given[0]!r} has no effect. Drop one."
            )
        if self.keep not in (None, "float"):
            raise PlanError(f"The rule for {self.match!r} says keep={self.keep!r}; only keep='float' exists.")
        if self.keep is None and not given:
            raise PlanError(f"The rule for {self.match!r} asks for nothing. Give a format, or keep='float'.")
        for name in (self.weight, self.activation):
            if name is not None:
                named_format(name)
        if self.scale not in (None, "learned", "frozen", "moving", "dynamic"):
            raise PlanError(f"Unknown scale {self.scale!r}. Known: learned, frozen, moving, dynamic.")
        if self.estimator is not None and self.scale == "learned":
            if "scale" not in estimator_from_name(self.estimator).learns:
                raise PlanError(
                    f"The rule for {self.match!r} asks for learned scales, and the estimator {self.estimator!r} gives "
                    "them no gradient. Use estimator='lsq', or scale='frozen'."
                )
        elif self.estimator is not None:
            estimator_from_name(self.estimator)
        if self.range is not None:
            range_from_name(self.range)

    def matches(self, name: str, type_: str, kind: str) -> bool:
        """Whether the pattern matches a layer or operation of this name, class and kind."""
        return name_matches(name, self.match) or self.match in (type_, kind)


@dataclass(frozen=True)
class Scheme:
    """A named set of choices for a whole model.

    Attributes:
        name: as users write it.
        weight: format of weights.
        activation: format of activations, or None where they stay float.
        arithmetic: `static` (integers end to end), `weight_only`, `dynamic` (the runtime quantises activations), or
            `float` (weights and inputs of products are quantised, and multiplied in float).
        description: one line for people.
        target: the runtime that is planned for where none is named.
        nonnegative: format of activations behind a ReLU, where it is another one.
        first_and_last: format of the weights of the first and the last layer, where it is another one.
        inputs: format of activations that no quantised layer has made, where it is another one.
        least_product: linear layers with fewer inputs or outputs stay float.
        keeps_heads: layers whose output leaves the model stay float.
        halves: the classes of layers that compute in float16 where they would stay float.
        mixture: which layers take other formats than `weight`, a key of `isogrid.planning.mixtures.MIXTURES`.
        falls_back: rows that a format's blocks do not divide are stored in another one, as llama.cpp has it, instead of
            being an error.
        scale, estimator, range: of weights, as in a Rule, where they are not the usual ones.
        only: the class of layers that it is made for; others are quantised by rules alone.
        sums: which values of a sum of two tensors share one grid: "inputs" the two of them, "all" their sum too, which
            then needs no rounding, and is fused with no layer; None leaves each its own.
        pools_keep_grid: averages over windows smaller than space lie on the grid of what they average.
    """

    name: str
    weight: str
    activation: str | None
    arithmetic: Literal["static", "weight_only", "dynamic", "float"]
    description: str
    target: str = "onnxruntime"
    nonnegative: str | None = None
    first_and_last: str | None = None
    inputs: str | None = None
    least_product: int = 0
    keeps_heads: bool = False
    halves: frozenset[str] = frozenset()
    mixture: str | None = None
    falls_back: bool = False
    scale: ScaleChoice | None = None
    estimator: str | None = None
    range: str | None = None
    only: str | None = None
    sums: Literal["inputs", "all"] | None = None
    pools_keep_grid: bool = False


_SEVEN_BITS = "8-bit weights, activations of 7 bits (0..127), whose products no x86 CPU lets overflow"

_OF_VLLM: tuple[tuple[str, str, str | None, FloatArithmetic, str], ...] = (
    ("w3a16", "int3/group128:scale=bfloat16", None, "weight_only", "3-bit weights in dense words"),
    ("w5a16", "int5/group128:scale=bfloat16", None, "weight_only", "5-bit weights in dense words"),
    ("w6a16", "int6/group128:scale=bfloat16", None, "weight_only", "6-bit weights in dense words"),
    ("w7a16", "int7/group128:scale=bfloat16", None, "weight_only", "7-bit weights in dense words"),
    ("w4a16-asym", "uint4/group128:scale=bfloat16", None, "weight_only", "4-bit weights with zero points"),
    ("w8a8-dynamic-cuda", "int8/channel", None, "float", "as w8a8-dynamic, inputs as vLLM's CUDA kernels round them"),
    ("fp8", "fp8_e4m3/tensor", "fp8_e4m3/tensor", "float", "FP8 weights and inputs, a scale per tensor"),
    ("fp8-dynamic", "fp8_e4m3/channel", None, "float", "FP8 weights per channel, inputs per token as they come"),
    ("fp8-block", "fp8_e4m3/tile128x128", None, "float", "FP8 weights per 128x128, inputs per 128 as they come"),
    ("nvfp4a16", "nvfp4", None, "weight_only", "4-bit floats in groups of 16 on FP8 scales"),
    ("mxfp4a16", "mxfp4", None, "weight_only", "4-bit floats in groups of 32 on powers of two"),
)
"""What vLLM runs and other targets do not; names as llm-compressor's presets."""

_OF_BITSANDBYTES = (
    ("nf4", "16 uneven values in blocks of 64"),
    ("nf4-double", "16 uneven values in blocks of 64, on 8-bit scales: the base of QLoRA"),
    ("bnb-fp4", "4-bit floats of bitsandbytes in blocks of 64"),
    ("bnb-fp4-double", "4-bit floats of bitsandbytes in blocks of 64, on 8-bit scales"),
)
"""Under the names of their formats."""

_OF_LLAMA_CPP = (
    ("f16", "float16", None, "weights and activations of every product in float16"),
    ("bf16", "bfloat16", None, "weights and activations of every product in bfloat16"),
    ("q8_0", "q8_0", "q8_0", "8-bit weights in blocks of 32"),
    ("q6_k", "q6_k", "q6_k", "6-bit weights in super-blocks of 256"),
    ("q5_k_m", "q5_k", "q5_k_m", "5-bit weights in super-blocks, the sensitive layers with 6 bits"),
    ("q5_k", "q5_k", "q5_k_m", "the same as q5_k_m"),
    ("q5_k_s", "q5_k", "q5_k_s", "5-bit weights in super-blocks of 256"),
    ("q5_1", "q5_1", "q5_1", "5-bit weights in blocks of 32, with minima"),
    ("q5_0", "q5_0", "q5_0", "5-bit weights in blocks of 32"),
    ("ud-q4_k_xl", "q4_k", "ud-q4_k_xl", "4-bit weights in super-blocks, sensitive layers with 5 and 6 bits"),
    ("q4_k_m", "q4_k", "q4_k_m", "4-bit weights in super-blocks, the sensitive layers with 6 bits"),
    ("q4_k", "q4_k", "q4_k_m", "the same as q4_k_m"),
    ("q4_k_s", "q4_k", "q4_k_s", "4-bit weights in super-blocks, the first values and feed-forward layers with 5 bits"),
    ("q4_1", "q4_1", "q4_1", "4-bit weights in blocks of 32, with minima"),
    ("q4_0", "q4_0", "q4_0", "4-bit weights in blocks of 32"),
    ("iq4_nl", "iq4_nl", "iq4_nl", "16 uneven values in blocks of 32"),
    ("mxfp4", "mxfp4", None, "4-bit floats in blocks of 32 on powers of two"),
    ("nvfp4", "nvfp4", None, "4-bit floats in blocks of 16 on 8-bit floats"),
    ("q3_k_l", "q3_k", "q3_k_l", "3-bit weights in super-blocks, half of the layers with 5 bits"),
    ("q3_k_m", "q3_k", "q3_k_m", "3-bit weights in super-blocks, half of the layers with 4 bits"),
    ("q3_k", "q3_k", "q3_k_m", "the same as q3_k_m"),
    ("q3_k_s", "q3_k", "q3_k_s", "3-bit weights in super-blocks of 256"),
    ("q2_k", "q2_k", "q2_k", "2-bit weights in super-blocks, half of the layers with 3 bits"),
    ("q2_k_s", "q2_k", "q2_k_s", "2-bit weights in super-blocks, the first feed-forward layers with 4 bits"),
    ("q2_0", "q2_0", "q2_0", "weights -1, 0, 1, 2 in blocks of 64"),
    ("tq2_0", "tq2_0", "tq2_0", "weights -1, 0, 1 in blocks of 256, four in a byte"),
    ("tq1_0", "tq1_0", "tq1_0", "weights -1, 0, 1 in blocks of 256, five in a byte"),
    ("q1_0", "q1_0", "q1_0", "weights -1, 1 in blocks of 128"),
)
"""Under llama-quantize's names, with its mixtures: name, format, mixture, description."""

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8", "int8/channel", "uint8/tensor", "static", "8-bit weights and activations, integers end to end"),
        Scheme("w4a8", "int4/channel", "uint8/tensor", "static", "4-bit weights, 8-bit activations"),
        Scheme("w2a8", "int2/channel", "uint8/tensor", "static", "2-bit weights (-2..1), 8-bit activations"),
        Scheme("ternary-a8", "ternary/channel", "uint8/tensor", "static", "weights -1, 0, 1, 8-bit activations"),
        Scheme("w8a16", "int8/group32", None, "weight_only", "8-bit weights, float arithmetic"),
        Scheme("w4a16", "int4/group32", None, "weight_only", "4-bit weights, float arithmetic"),
        Scheme("w2a16", "int2/group32", None, "weight_only", "2-bit weights, float arithmetic"),
        Scheme("w8a8-dynamic", "int8/group32", None, "dynamic", "8-bit weights, activations quantised as they come"),
        Scheme("w4a8-dynamic", "int4/group32", None, "dynamic", "4-bit weights, activations quantised as they come"),
        # As torchao and ExecuTorch call them.
        Scheme(
            "8da8w", "int8/channel", None, "dynamic", "8-bit weights, int8 rows as they come", target="executorch"
        ),
        Scheme(
            "8da4w",
            "int4/group32:scale=bfloat16",
            None,
            "dynamic",
            "4-bit weights on bfloat16 scales, int8 rows as they come",
            target="executorch",
        ),
        # As the backends of torch.ao.quantization are called, with the formats of their default configurations.
        Scheme("x86", "int8/channel", "uint7/tensor", "static", _SEVEN_BITS),
        Scheme("fbgemm", "int8/channel", "uint7/tensor", "static", f"{_SEVEN_BITS}; the same as x86"),
        Scheme("onednn", "int8/channel", "uint8/tensor", "static", "8-bit weights and activations; the same as w8a8"),
        Scheme("qnnpack", "int8/tensor", "uint8/tensor", "static", "8 bits, one scale for a whole weight"),
        Scheme(
            "xnnpack",
            "int8/channel:narrow",
            "int8/tensor:asymmetric",
            "static",
            "8 bits as ExecuTorch's XNNPACKQuantizer has them",
            target="executorch",
        ),
        Scheme("tensorrt", "int8/channel", "int8/tensor", "static", "8 bits without zero points", target="tensorrt"),
        Scheme(
            "finn",
            "int4/channel:scale=e8m0",
            "int4/tensor:scale=e8m0",
            "static",
            "4 bits for FPGAs: unsigned behind ReLU, 8 bits at both ends, power-of-two scales without zero points",
            target="qonnx",
            nonnegative="uint4/tensor:symmetric,scale=e8m0",
            first_and_last="int8/channel:scale=e8m0",
            inputs="int8/tensor:scale=e8m0",
            sums="inputs",
        ),
        Scheme(
            "portable",
            "int7/channel:scale=e8m0",
            "uint8/tensor:even,scale=e8m0",
            "static",
            "one model for all runtimes: power-of-two scales, sums on one grid, heads in float",
            keeps_heads=True,
            sums="all",
        ),
        *(
            Scheme(name, weight, activation, arithmetic, what, target="vllm", keeps_heads=True)
            for name, weight, activation, arithmetic, what in _OF_VLLM
        ),
        Scheme(
            "w2a16-asym",
            "uint2/group64:scale=bfloat16",
            None,
            "weight_only",
            "2-bit weights with zero points that are learned, as EfficientQAT trains them",
            target="vllm",
            keeps_heads=True,
            estimator="efficientqat",
        ),
        *(
            Scheme(name, name, None, "weight_only", what, target="bitsandbytes", keeps_heads=True)
            for name, what in _OF_BITSANDBYTES
        ),
        *(
            Scheme(name, weight, None, "dynamic", what, target="llamacpp", mixture=mixture, falls_back=True)
            for name, weight, mixture, what in _OF_LLAMA_CPP
        ),
        Scheme(
            "bitnet",
            "bitnet",
            None,
            "dynamic",
            "weights -1, 0, 1 with their mean magnitude, int8 tokens: BitNet b1.58, of BitLinear layers",
            target="pytorch",
            scale="dynamic",
            estimator="identity",
            range="absmean",
            only="BitLinear",
        ),
    )
}
"""The schemes by name."""


def scheme_from_name(name: str) -> Scheme:
    """A scheme by its name; raises PlanError with the nearest names where there is none.

    >>> scheme_from_name("w8a8").weight
    'int8/channel'
    """
    if name not in SCHEMES:
        raise PlanError(f"Unknown scheme {name!r}.{nearest(name, SCHEMES)} Known: {', '.join(SCHEMES)}.")
    return SCHEMES[name]


def unmatched_rule_error(rule: Rule, graph: Graph) -> PlanError:
    """The error for a rule that matches nothing that could be quantised, with what it may have meant."""
    kinds = {*COMPUTING_KINDS, *JOINING_KINDS, "embedding"}
    known = [name for name, calls in graph.by_name.items() if calls[0].kind in kinds]
    states = [call.name for call in graph.states]
    if any(rule.matches(name, "", "") for name in graph.uncalled):
        why = "matches only modules that the example inputs did not reach."
    elif found := [c for c in graph.calls if c.kind not in kinds and rule.matches(c.name, c.type, c.kind)]:
        reason = found[0].reason or f"{found[0].type} stays float in any case, or is part of the layer before it"
        why = f"matches only what no rule can change: {found[0].name!r} ({reason})."
    elif any(rule.matches(name, graph.by_name[name][0].type, graph.by_name[name][0].kind) for name in known):
        why = "matches only what earlier rules already match. The first rule that matches wins."
    else:
        why = f"matches nothing.{nearest(rule.match, [*known, *states])}"
    text = f"The rule for {rule.match!r} {why} Layers and operations: {', '.join(known) or 'none'}."
    return PlanError(text + (f" Queries and caches of attention: {', '.join(states)}." if states else ""))


def name_matches(name: str, pattern: str) -> bool:
    r"""Whether a name is what a pattern with wildcards, or a regular expression behind `re:`, stands for.

    >>> name_matches("layers.3.mlp", "layers.[0-4].*"), name_matches("layers.3.mlp", r"re:layers\.\d")
    (True, False)
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the most similar known words, or nothing."""
    similar = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in similar)}?" if similar else ""
