"""transformers' Trainer and TRL's SFTTrainer: one callback that makes a run quantization-aware."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isogrid.api import Schedule, calibrate, parameter_groups, plan, prepare
from isogrid.errors import PlanError
from isogrid.integrations.deployed import evaluate_deployed
from isogrid.integrations.guiding import OF_LABELS, Guide
from isogrid.planning.rules import Rule
from isogrid.planning.state import is_prepared, steps_done
from isogrid.training import Distillation, Teacher, teacher

FROM_ITSELF = Distillation()
"""The divergence at temperature 1, and no labels."""


class QAT(TrainerCallback):
    """Makes a Trainer's model quantised, trains it from its own float self, and evaluates what will be deployed.

    Made before the Trainer, it plans, prepares and calibrates the model, in place. While the Trainer runs, it drives
    the schedule by optimizer steps, lets the model's loss be the distillation's, and lets evaluation run
    `convert(model)`, so that `metric_for_best_model` and EarlyStoppingCallback decide by the deployed figures. The
    Trainer's own checkpoints hold everything: a run that was killed resumes with the losses it would have had.

        qat = QAT(model, scheme="w4a16", batches=[collator(examples)])
        trainer = Trainer(model, arguments, ..., callbacks=[qat], optimizer_cls_and_kwargs=qat.optimizer(arguments))

    TRL's SFTTrainer computes the loss past the model's head: it also needs `compute_loss_func=qat.loss`.

    Args:
        model: float, of transformers; or prepared and calibrated by you.
        batches: dictionaries of the model's inputs to calibrate with; the first is the plan's example. Labels are left
            out. None for a model that is prepared.
        scheme, target, rules: as for `isogrid.plan`.
        distillation: the loss; None for the model's own, on labels.
        distils_from: a teacher; the model itself in float where not given.
        schedule: keyword arguments of `isogrid.Schedule`.
        scale_lr: by what share of itself a scale may move a step; the learning rate where not given.
        evaluates_deployed: whether evaluation runs `convert(model)`.

    Raises:
        PlanError: the model is prepared and batches are given, or neither.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]] | None = None,
        scheme: str = "w4a16",
        *,
        target: str | None = None,
        rules: Sequence[Rule] = (),
        distillation: Distillation | None = FROM_ITSELF,
        distils_from: Teacher | None = None,
        schedule: Mapping[str, Any] | None = None,
        scale_lr: float | None = None,
        evaluates_deployed: bool = True,
    ):
        if is_prepared(model) != (batches is None):
            raise PlanError(
                "Give batches to calibrate a float model with, and none for a model that is prepared and calibrated."
            )
        if batches is not None:
            inputs = [{name: part for name, part in batch.items() if name not in OF_LABELS} for batch in batches]
            prepare(model, plan(model, target, scheme, rules, example_inputs=inputs[0] if inputs else {}))
            calibrate(model, inputs)
        self.model, self.scale_lr = model, scale_lr
        self.schedule: Schedule | None = None
        self._schedule = dict(schedule or {})
        guide = None if distillation is None else distils_from or teacher(model)
        self._guide = Guide(model, guide, distillation or FROM_ITSELF)
        self._deployed = evaluate_deployed(model) if evaluates_deployed else None

    def optimizer(self, arguments: TrainingArguments) -> tuple[Any, dict[str, Any]]:
        """`optimizer_cls_and_kwargs` of a Trainer: the optimizer of its arguments, scales in groups of their own."""
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        groups = parameter_groups(
            self.model, lr=arguments.learning_rate, weight_decay=arguments.weight_decay, scale_lr=self.scale_lr
        )
        return kind, {**options, "params": groups}

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """`compute_loss_func` of loops that compute the loss past the model, as TRL's SFTTrainer does."""
        return self._guide.loss(outputs, labels, num_items_in_batch)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The Trainer's count is the truth: it may begin anew with a model that was trained before.
        steps_done(self.model).fill_(state.global_step)
        self.schedule = Schedule(self.model, state.max_steps, **self._schedule)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._deployed is not None:
            self._deployed.forget()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.schedule is not None:
            self.schedule.step()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._deployed is not None:
            self._deployed.forget()
