"""The activation rules by name: what runtimes that quantise activations as they come do to them."""

from dataclasses import dataclass

from torch import Tensor

from isogrid.errors import PlanError
from isogrid.formats import PerGroup
from isogrid.formats.granularity import Granularity
from isogrid.layers import llamacpp_activations, llamacpp_cache, vllm_activations, xnnpack_activations
from isogrid.layers.activation_rule import ActivationRule
from isogrid.layers.bitnet_activations import BitNetActivations
from isogrid.layers.nbits import BLOCKS, reciprocal_block


@dataclass(frozen=True)
class MatMulNBits(ActivationRule):
    """int8 activations as ONNX Runtime's MatMulNBits quantises them at accuracy level 4.

    For each row and block of `block` values: `q = rint(x * f32(127 / amax))`, scale `amax / 127`.

    >>> import torch
    >>> MatMulNBits(32)(torch.full((1, 32), 0.5))[0, :2]
    tensor([0.5000, 0.5000])
    """

    block: int

    @property
    def name(self) -> str:
        return f"matmulnbits-{self.block}"

    @property
    def granularity(self) -> Granularity:
        return PerGroup(self.block)

    def values(self, x: Tensor) -> Tensor:
        codes, scale = reciprocal_block(x)
        return codes * scale


ACTIVATION_RULES: dict[str, ActivationRule] = {
    rule.name: rule
    for rule in (
        *[MatMulNBits(block) for block in BLOCKS],
        *llamacpp_activations.RULES,
        *llamacpp_cache.RULES,
        *vllm_activations.RULES,
        xnnpack_activations.Qd8(),
        BitNetActivations(),
    )
}
"""The rules by the name that a plan carries; a target names one for each layer, see `Target.activation_rule`."""


def activation_rule(name: str) -> ActivationRule:
    """A rule by its name; raises PlanError where there is none.

    >>> activation_rule("q8_k")
    Q8_K()
    """
    if name not in ACTIVATION_RULES:
        raise PlanError(f"Unknown activation rule {name!r}. Known: {', '.join(ACTIVATION_RULES)}.")
    return ACTIVATION_RULES[name]
