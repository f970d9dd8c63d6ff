"""What llama.cpp stores of keys and values, by the type of its cache.

A row of the cache is quantised by ggml's plain rules for the type (`quantize_row_*_ref` in ggml-quants.c; Q8_0 is in
`llamacpp_activations`). Heads whose size 64 divides are rotated by a Hadamard matrix first, and so are queries: keys by
the largest such matrix that divides the head, values by one of 64 (`llama_kv_cache::build_input_k_rot` and
`build_input_v_rot`). As the matrix is its own inverse, values are rotated back here. Files of the Llama architecture
have the rows of queries and keys in pairs, as its rotary embedding turns them, so that a block holds other values of a
head than in transformers.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from isogrid.formats import NativeGrid, PerGroup
from isogrid.formats.granularity import Granularity
from isogrid.layers.activation_rule import ActivationRule
from isogrid.layers.hadamard import hadamard_matrix
from isogrid.layers.llamacpp_activations import BLOCK, Q8_0

ROTATIONS = (64, 128, 256, 512)
"""The sizes of matrices; heads are not larger."""

_FLOAT16 = NativeGrid(torch.float16)


@dataclass(frozen=True)
class SignedBlock(ActivationRule):
    """Q4_0 and Q5_0: blocks of 32 on a float16 scale, on which the value of largest magnitude is the lowest code.

    >>> SignedBlock(4)(torch.tensor([[8.0, 0.4, -1.6] + [0.0] * 29]))[0, :3]
    tensor([ 8., -0., -2.])
    """

    bits: int

    @property
    def name(self) -> str:
        return f"q{self.bits}_0"

    @property
    def granularity(self) -> Granularity:
        return PerGroup(BLOCK)

    def values(self, x: Tensor) -> Tensor:
        x, half = x.float(), 1 << (self.bits - 1)
        scale = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -half
        codes: Tensor = torch.floor(x * _reciprocal(scale) + (half + 0.5)).clamp(max=2 * half - 1) - half
        return codes * _FLOAT16.nearest(scale)


@dataclass(frozen=True)
class BlockWithMinimum(ActivationRule):
    """Q4_1 and Q5_1: blocks of 32 on a float16 scale, above a float16 minimum.

    >>> BlockWithMinimum(4)(torch.tensor([[-1.0, 14.0, 0.6] + [0.0] * 29]))[0, :3]
    tensor([-1., 14.,  1.])
    """

    bits: int

    @property
    def name(self) -> str:
        return f"q{self.bits}_1"

    @property
    def granularity(self) -> Granularity:
        return PerGroup(BLOCK)

    def values(self, x: Tensor) -> Tensor:
        x, highest = x.float(), (1 << self.bits) - 1
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / torch.full_like(low, highest)  # true division
        codes = torch.floor((x - low) * _reciprocal(scale) + 0.5).clamp(max=highest)
        return codes * _FLOAT16.nearest(scale) + _FLOAT16.nearest(low)


@dataclass(frozen=True)
class Arranged(ActivationRule):
    """Another rule, on heads of some size that lie in another arrangement before they are cut into blocks.

    Args:
        rule: for blocks, or itself on arranged heads.
        size: of what is arranged together.
    """

    rule: ActivationRule
    size: int

    @property
    def granularity(self) -> Granularity:
        return PerGroup(self.size)

    def values(self, x: Tensor) -> Tensor:
        return restored(self, plain(self).values(arranged(self, x).reshape(-1, BLOCK)).reshape(x.shape))


class Rotated(Arranged):
    """Turned by a Hadamard matrix of a size, and back afterwards.

    >>> Rotated(Q8_0(), 64)(torch.ones(1, 64))[0, :2].round(decimals=2)
    tensor([1., 1.])
    """

    @property
    def name(self) -> str:
        return f"{self.rule.name}-rotated{self.size}"


class Paired(Arranged):
    """Heads of a size whose halves are dealt out in turn: 0, n/2, 1, n/2 + 1, ...

    >>> Paired(SignedBlock(4), 32)(torch.arange(32.0)[None])[0, :2]
    tensor([-0., -0.])
    """

    @property
    def name(self) -> str:
        return f"{self.rule.name}-paired{self.size}"


def plain(rule: ActivationRule) -> ActivationRule:
    """The rule for blocks that is inside others."""
    return plain(rule.rule) if isinstance(rule, Arranged) else rule


def arranged(rule: ActivationRule, x: Tensor) -> Tensor:
    """Heads [..., size] as llama.cpp has them when it cuts them into blocks, float32."""
    x = x.float()
    if isinstance(rule, Paired):
        x = x.reshape(-1, 2, rule.size // 2).transpose(1, 2).reshape(x.shape)
        return arranged(rule.rule, x)
    return _turned(x, rule.size) if isinstance(rule, Rotated) else x


def restored(rule: ActivationRule, y: Tensor) -> Tensor:
    """What `arranged` has done, undone.

    >>> rule, heads = Paired(Rotated(Q8_0(), 64), 64), torch.eye(64)
    >>> (restored(rule, arranged(rule, heads)) - heads).abs().max() < 1e-6
    tensor(True)
    """
    if isinstance(rule, Paired):
        inner = restored(rule.rule, y)
        return inner.reshape(-1, rule.size // 2, 2).transpose(1, 2).reshape(y.shape)
    return _turned(y, rule.size) if isinstance(rule, Rotated) else y


def codes_of(rule: ActivationRule, stored: Tensor, like: Tensor) -> Tensor:
    """Numbers of the codes of values [..., size], both as `arranged`, on the grids of others that are stored.

    >>> stored = Q8_0()(torch.linspace(-1, 1, 32)[None])
    >>> codes_of(Q8_0(), stored, stored)[0, [0, -1]]
    tensor([-127.,  127.])
    """
    inside = plain(rule)
    blocks, known = (x.reshape(-1, BLOCK) for x in (stored, like))
    low = known.amin(-1, keepdim=True) if isinstance(inside, BlockWithMinimum) else torch.zeros_like(known[:, :1])
    step = (known - low).abs().amax(-1, keepdim=True) / _LEVELS[inside.name]
    return torch.round((blocks - low) * _reciprocal(step)).reshape(stored.shape)


_LEVELS = {"q8_0": 127, "q5_0": 16, "q4_0": 8, "q5_1": 31, "q4_1": 15}
"""How many steps the largest magnitude is, or the highest above the lowest."""


def _turned(x: Tensor, size: int) -> Tensor:
    return (x.reshape(-1, size) @ hadamard(size).to(x.device)).reshape(x.shape)


@lru_cache
def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix as ggml has it, float32 [size, size]; the size is a power of two.

    >>> hadamard(4)[1]
    tensor([ 0.5000, -0.5000,  0.5000, -0.5000])
    """
    matrix = hadamard_matrix(size).float()
    return matrix / torch.full_like(matrix, size**0.5)


def rotation_of(kind: str, size: int) -> int:
    """The size of the matrix that rotates keys or values of heads of a size; 0 where none does.

    >>> rotation_of("key_cache", 128), rotation_of("key_cache", 192), rotation_of("value_cache", 128)
    (128, 64, 64)
    """
    if size % 64:
        return 0
    return 64 if kind == "value_cache" else max(rotation for rotation in ROTATIONS if size % rotation == 0)


def _reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, torch.ones_like(scale) / scale)


STORED: dict[str, ActivationRule] = {
    rule.name: rule for rule in (Q8_0(), SignedBlock(5), SignedBlock(4), BlockWithMinimum(5), BlockWithMinimum(4))
}
"""What each type of cache stores."""


def stored_in(type_: str, kind: str, size: int, paired: bool = False) -> ActivationRule:
    """What llama.cpp makes of keys or values.

    Args:
        type_: of the cache, a key of `STORED`.
        kind: key_cache or value_cache; queries are rotated like keys.
        size: of a head.
        paired: whether the rows of queries and keys are in pairs.

    >>> stored_in("q8_0", "key_cache", 128, paired=True).name
    'q8_0-rotated128-paired128'
    """
    rule, rotation = STORED[type_], rotation_of(kind, size)
    rule = Rotated(rule, rotation) if rotation else rule
    return Paired(rule, size) if paired and kind != "value_cache" else rule


_ALL = {
    rule.name: rule
    for type_ in STORED
    for kind in ("key_cache", "value_cache")
    for size in range(BLOCK, ROTATIONS[-1] + 1, BLOCK)
    for paired in (False, True)
    for rule in (stored_in(type_, kind, size, paired),)
}
RULES = tuple(rule for rule in _ALL.values() if rule.name != "q8_0")
"""The rules, but for that of Q8_0 alone, which inputs of layers know."""
