"""What a prepared model knows about itself."""

from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import PlanError
from isogrid.layers.batch_norm import AbsorbedBatchNorm
from isogrid.planning.plan import Plan
from isogrid.quantizers import Quantizer

STATE_NAME = "isogrid"
"""The child of a prepared model that holds its plan and the schedule's step."""


class PreparedState(nn.Module):
    """The plan of a prepared model, and how many optimizer steps its schedule has seen.

    Attributes:
        plan: frozen.
        step: int64 buffer [1], in the checkpoint like every other buffer.
    """

    step: Tensor

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Any) -> Any:
        """x itself: nn.Sequential calls all of its children, this one too."""
        return x

    def extra_repr(self) -> str:
        return f"{self.plan.scheme} for {self.plan.target}"


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare` has been here."""
    return isinstance(getattr(model, STATE_NAME, None), PreparedState)


def prepared_state(model: nn.Module) -> PreparedState:
    """The state of a prepared model; raises PlanError where it is not prepared."""
    state = getattr(model, STATE_NAME, None)
    if not isinstance(state, PreparedState):
        raise PlanError("The model is not prepared. Call isogrid.prepare(model, plan) first.")
    return state


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a prepared model by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def weight_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Those that quantise weights."""
    return {name: q for name, q in quantizers(model).items() if name.endswith("weight_quantizer")}


def activation_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Those that quantise what flows."""
    return {name: q for name, q in quantizers(model).items() if not name.endswith("weight_quantizer")}


def absorbed_batch_norms(model: nn.Module) -> list[AbsorbedBatchNorm]:
    """The batch norms that preceding layers apply."""
    return [module for module in model.modules() if isinstance(module, AbsorbedBatchNorm)]
