"""The schedule: which part of quantisation is on at which optimizer step."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from isogrid.errors import PlanError
from isogrid.planning.state import absorbed_batch_norms, quantizers, steps_done
from isogrid.training.calibration import fit_activations


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Attributes:
        name: float, observe, weights, ramp or quantized.
        start: the first optimizer step of the phase.
    """

    name: str
    start: int


@dataclass(frozen=True)
class TwoStages:
    """Learning rate and weight decay in two stages, as BitNet b1.58 is trained from scratch.

    Its authors ("Training Tips, Code and FAQ", 2024) start with several times the learning rate of a float model, drop
    it halfway, and take the weight decay away there: magnitudes stand for confidence, and decay keeps codes flipping.
    Use it after whatever else sets the learning rate of a step.

    Args:
        lr: what the learning rate is multiplied by in the second stage; 1.5e-3 to 1e-3 in the smallest model.
        weight_decay: what the weight decay is multiplied by.
        at: share of all steps after which the second stage begins.

    >>> import torch
    >>> parameter = nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.AdamW([parameter], lr=3e-3, weight_decay=0.1)
    >>> TwoStages().apply(optimizer, step=5, total_steps=10)
    >>> [round(optimizer.param_groups[0][name], 6) for name in ("lr", "weight_decay")]
    [0.002, 0.0]
    """

    lr: float = 2 / 3
    weight_decay: float = 0.0
    at: float = 0.5

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0 or not 0 <= self.at <= 1:
            raise PlanError("lr is above 0, weight_decay is at least 0, and at is a share of the steps, from 0 to 1.")

    def apply(self, optimizer: Optimizer, step: int, total_steps: int) -> None:
        """Set what the optimizer needs for a step, counted from 0; its `lr` must be that of a run in one stage."""
        second = step >= round(self.at * total_steps)
        for group in optimizer.param_groups:
            group.setdefault("initial_weight_decay", group.get("weight_decay", 0.0))
            group["weight_decay"] = group["initial_weight_decay"] * (self.weight_decay if second else 1.0)
            if second:
                group["lr"] *= self.lr


class Schedule:
    """Switches quantisation on, ramps it up and freezes what must settle, by optimizer steps.

    In order: `float_steps` of ordinary training; `observe_steps` in which observers watch and then set the ranges of
    the activations; `weight_only_steps` with quantised weights and float activations; `ramp_steps` in which the
    quantisation error is blended in from 0 to 1; then all of it. Batch norm goes over to its running statistics, and
    ranges and scales stop moving, at a share of all steps.

    The position is a buffer of the model, so a checkpoint of the model holds it: make the schedule again with the same
    arguments, before or after loading, and it continues where it was. Evaluation does not count.

    Args:
        model: prepared.
        total_steps: optimizer steps of the whole run.
        float_steps, observe_steps, weight_only_steps, ramp_steps: lengths of the first phases.
        freeze_batch_norm: share of total_steps after which batch norm uses its running statistics.
        freeze_ranges: share of total_steps after which scales stop moving.

    Raises:
        PlanError: the model is not prepared, or the phases do not fit into total_steps.

    >>> import isogrid as ig, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> plan = ig.plan(model, scheme="w8a8", example_inputs=(torch.zeros(1, 4),))
    >>> schedule = Schedule(ig.prepare(model, plan), total_steps=10, float_steps=2, observe_steps=3)
    >>> schedule.phase
    'float'
    >>> schedule.phases()
    [Phase(name='float', start=0), Phase(name='observe', start=2), Phase(name='quantized', start=5)]
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        float_steps: int = 0,
        observe_steps: int = 0,
        weight_only_steps: int = 0,
        ramp_steps: int = 0,
        freeze_batch_norm: float = 0.7,
        freeze_ranges: float = 0.9,
    ):
        lengths = {"float": float_steps, "observe": observe_steps, "weights": weight_only_steps, "ramp": ramp_steps}
        if total_steps < 1 or min(lengths.values()) < 0 or sum(lengths.values()) > total_steps:
            raise PlanError(
                f"The phases take {sum(lengths.values())} steps and the run has {total_steps}. "
                "Give steps of at least 0 that fit into total_steps."
            )
        if not (0.0 <= freeze_batch_norm <= 1.0 and 0.0 <= freeze_ranges <= 1.0):
            raise PlanError("freeze_batch_norm and freeze_ranges are shares of total_steps, between 0 and 1.")
        self._model = model
        self.total_steps = total_steps
        self.freeze_batch_norm_at = round(freeze_batch_norm * total_steps)
        self.freeze_ranges_at = round(freeze_ranges * total_steps)
        self._lengths = lengths
        self._apply(self.position)
        model.register_load_state_dict_post_hook(self._after_load)  # type: ignore[no-untyped-call]

    @property
    def position(self) -> int:
        """Optimizer steps done."""
        return int(steps_done(self._model))

    @property
    def phase(self) -> str:
        """The name of the phase that the next forward belongs to."""
        return self._phase_at(self.position)

    def phases(self) -> list[Phase]:
        """The phases that take place, in order."""
        found, start = [], 0
        for name, length in self._lengths.items():
            if length:
                found.append(Phase(name, start))
            start += length
        return [*found, Phase("quantized", start)]

    def step(self) -> None:
        """Count one optimizer step; call it after `optimizer.step()`.

        Raises:
            NotCalibratedError: observing ends, and a site has seen nothing.
        """
        position = self.position
        if self._phase_at(position) == "observe" != self._phase_at(position + 1):
            fit_activations(self._model)
        steps_done(self._model).add_(1)
        self._apply(position + 1)

    def _phase_at(self, position: int) -> str:
        return [phase.name for phase in self.phases() if phase.start <= position][-1]

    def _after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        self._apply(self.position)

    def _apply(self, position: int) -> None:
        """Set every switch of the model for the step at a position."""
        phase = self._phase_at(position)
        for name, quantizer in quantizers(self._model).items():
            of_weight = name.endswith("weight_quantizer")
            quantizer.enabled = phase not in (("float", "observe") if of_weight else ("float", "observe", "weights"))
            quantizer.observing = phase == "observe"
            quantizer.ramping = phase == "ramp"
            quantizer.range_is_frozen = position >= self.freeze_ranges_at
            if phase == "ramp":
                start = sum(self._lengths.values()) - self._lengths["ramp"]
                quantizer.strength.fill_((position - start + 1) / (self._lengths["ramp"] + 1))
        for batch_norm in absorbed_batch_norms(self._model):
            batch_norm.statistics_are_frozen = position >= self.freeze_batch_norm_at
