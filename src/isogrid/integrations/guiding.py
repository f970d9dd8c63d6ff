"""Distillation where the loop takes the loss from the model's outputs, as transformers' Trainer does."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.errors import DistillationError
from isogrid.training import Distillation, Teacher
from isogrid.training.distillation import IGNORED, cross_entropy
from isogrid.training.outputs import logits_of

OF_LABELS = ("labels", "shift_labels", "num_items_in_batch")
"""Arguments of a model of transformers that only its loss reads."""


class Guide:
    """Runs a teacher beside a model of transformers in training, and gives the loss.

    The `loss` that the model returns for `labels` becomes the distillation's; loops that compute the loss themselves
    call `loss`. Positions whose label is -100 do not count, and where the loop says how many tokens a whole step has
    (`num_items_in_batch`), the loss is a share of them, so that accumulated gradients are those of the whole batch.

    Args:
        model: prepared, called with keyword arguments.
        teacher: called with all of them but the labels; None to learn from labels alone.
        distillation: the loss; its task's share is the cross-entropy.
    """

    def __init__(self, model: nn.Module, teacher: Teacher | None, distillation: Distillation):
        self.model, self.teacher, self.distillation = model, teacher, distillation
        self._said: Tensor | None = None

        # Hooks are plain functions: a copy of the model shares them, and what they refer to is not copied along.
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if module is model and model.training and torch.is_grad_enabled():
                self._ask(args, kwargs)

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
            if self._said is None or module is not model or not model.training or kwargs.get("labels") is None:
                return None
            outputs["loss"] = self.loss(outputs, kwargs["labels"], kwargs.get("num_items_in_batch"))
            return outputs

        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after, with_kwargs=True)

    def _ask(self, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("fused_lm_head"):
            raise DistillationError(
                "SFTTrainer computes the loss past the model's head, which leaves no logits and skips the head's "
                "quantisation. Pass it compute_loss_func=qat.loss."
            )
        if self.teacher is not None:
            inputs = {name: value for name, value in kwargs.items() if name not in OF_LABELS}
            self._said = logits_of(self.teacher(*args, **inputs))

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The loss of the model's latest outputs; in evaluation, where no teacher has run, the cross-entropy.

        Args:
            outputs: of the model, with logits.
            labels: int64; of a causal language model not shifted.
            num_items_in_batch: tokens of the whole step; those of these labels where not given.
        """
        said, self._said = self._said, None
        logits = logits_of(outputs)
        if logits is None:
            raise DistillationError("The model returned no logits. Switch off what fuses its head and its loss.")
        targets = labels.to(logits.device)
        if getattr(self.model, "loss_type", None) == "ForCausalLM":  # a position predicts the label one later
            targets = F.pad(targets, (0, 1), value=IGNORED)[..., 1:]
        found: Tensor
        if said is None:
            found = cross_entropy(logits, targets)
        else:
            found = self.distillation(logits, said, targets, overwrite_teacher=True)
        if num_items_in_batch is None or targets.shape != logits.shape[:-1]:
            return found
        return found * ((targets != IGNORED).sum() / torch.as_tensor(num_items_in_batch, device=found.device))
