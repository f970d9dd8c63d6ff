"""What a prepared model knows about itself."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isogrid.errors import PlanError
from isogrid.layers.adapters import AdapterSpec
from isogrid.layers.batch_norm import AbsorbedBatchNorm
from isogrid.layers.scope import unplanned as calls_unplanned
from isogrid.planning.plan import Plan
from isogrid.quantizers import Quantizer

STATE_NAME = "isogrid"
"""The attribute of a prepared model that holds its state."""

STEP_NAME = "isogrid_step"
"""The buffer of a prepared model that counts the schedule's steps, in the checkpoint like every other buffer."""


@dataclass(frozen=True)
class PreparedState:
    """The plan of a prepared model, and the adapters that it was given.

    Attributes:
        plan: of `isogrid.plan`.
        adapters: in the order in which they were added.
        requantized: names of adapters that were merged by quantising the weights anew, which no training has seen.
    """

    plan: Plan
    adapters: tuple[AdapterSpec, ...] = ()
    requantized: tuple[str, ...] = ()


def add_state(model: nn.Module, plan: Plan) -> None:
    """Make a model a prepared one.

    Neither attribute is a child, so that nn.Sequential keeps its length and its order.
    """
    setattr(model, STATE_NAME, PreparedState(plan))
    device = next((parameter.device for parameter in model.parameters()), None)
    model.register_buffer(STEP_NAME, torch.zeros(1, dtype=torch.int64, device=device))


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare` has been here."""
    return isinstance(getattr(model, STATE_NAME, None), PreparedState)


def prepared_state(model: nn.Module) -> PreparedState:
    """The state of a prepared model; raises PlanError where it is not prepared."""
    state = getattr(model, STATE_NAME, None)
    if not isinstance(state, PreparedState):
        raise PlanError("The model is not prepared. Call isogrid.prepare(model, plan) first.")
    return state


def steps_done(model: nn.Module) -> Tensor:
    """How many optimizer steps the schedule of a prepared model has seen: int64 [1], the buffer itself."""
    prepared_state(model)
    return model.get_buffer(STEP_NAME)


def unplanned(model: nn.Module) -> tuple[str, ...]:
    """The operations that a prepared model has run so far and that its plan does not know; they run in float.

    So it is with a branch of a forward that the example inputs did not take. They are also logged as a warning, once
    for all modules of a class that make the same calls.

    Raises:
        PlanError: the model is not prepared.
    """
    prepared_state(model)
    modules = model.named_modules()
    return tuple(f"{path}.{name}".lstrip(".") for path, module in modules for name in sorted(calls_unplanned(module)))


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
