"""What a student learns from a teacher: its distribution, and as much of the task as one likes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.errors import DistillationError
from isogrid.training.divergences import TopK, kl_divergence
from isogrid.training.outputs import logits_of

IGNORED = -100
"""The target of positions that have none, as PyTorch's cross-entropy has it."""


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """The mean loss over the targets that are not -100: of any logits [..., classes] and int64 [...].

    >>> round(float(cross_entropy(torch.zeros(1, 2, 2), torch.tensor([[1, -100]]))), 4)
    0.6931
    """
    logits = logits_of(outputs)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), ignore_index=IGNORED)


@dataclass(frozen=True)
class Distillation:
    """The loss between a student's outputs and its teacher's: L = (1 − t)·T²·KL + t·(the task's own loss).

    The default is quantization-aware distillation as NVIDIA has it (QAD, arXiv 2601.20088): the forward divergence at
    T = 1 and no labels at all. It is what repairs a model after post-training; cross-entropy would undo that.

    Args:
        temperature: T.
        task: t, the share of the task's loss, from 0 to 1.
        reverse: share of the reverse divergence; see `kl_divergence`.

    Raises:
        DistillationError: a share is not between 0 and 1, or the temperature not above 0.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    >>> Distillation()(student, teacher)
    tensor(0.5023)
    >>> Distillation(task=0.5)(student, teacher, torch.tensor([1]))
    tensor(0.5977)
    """

    temperature: float = 1.0
    task: float = 0.0
    reverse: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.task <= 1 and 0 <= self.reverse <= 1):
            raise DistillationError("task and reverse are shares, from 0 to 1.")
        if not self.temperature > 0:
            raise DistillationError(f"A temperature of {self.temperature} cannot divide logits. Use one above 0.")

    def __call__(
        self,
        outputs: Any,
        teacher_outputs: Any,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        task_loss: Callable[[Any, Any], Tensor] = cross_entropy,
        overwrite_teacher: bool = False,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            outputs: of the student: logits float [..., classes], or what holds or begins with them.
            teacher_outputs: of the teacher on the same inputs, likewise; or a TopK of them.
            targets: int64 [...]; positions of -100 count for nothing. Only needed for a task's share.
            mask: bool [...], positions that count, where targets do not say.
            task_loss: of outputs and targets.
            overwrite_teacher: give the teacher's logits up, so that their memory holds the gradient.

        Returns:
            float32 [].

        Raises:
            DistillationError: another vocabulary, or a task's share without targets.
            NonFiniteError: the teacher's logits hold NaN or infinity.
        """
        student = logits_of(outputs)
        guide = teacher_outputs if isinstance(teacher_outputs, TopK) else logits_of(teacher_outputs)
        if mask is None and targets is not None and targets.shape == student.shape[:-1]:
            mask = targets != IGNORED
        if self.task and targets is None:
            raise DistillationError("A task's share needs targets. Pass them, or use Distillation(task=0).")
        total = torch.zeros((), device=student.device)
        if self.task < 1:
            divergence = kl_divergence(
                student, guide, temperature=self.temperature, reverse=self.reverse, mask=mask,
                overwrite_teacher=overwrite_teacher,
            )  # fmt: skip
            total = total + (1 - self.task) * divergence
        return total + self.task * task_loss(outputs, targets) if self.task else total


Stage = Literal["self-study", "co-study", "tutoring"]


@dataclass(frozen=True)
class ThreePhases:
    """QKD (arXiv 1911.12491): a student that learns by itself, then together with its teacher, then from it.

    In self-study the quantised student has the task's loss alone. In co-study both learn the task and from each other,
    so that the teacher becomes one whom a quantised student can follow. In tutoring the teacher stays as it is. The
    teacher is another float model, which trains too: give its parameters to an optimizer.

    Args:
        total_steps: optimizer steps of the whole run.
        self_study, co_study: shares of all steps; tutoring has the rest.
        temperature: of the divergences.

    Raises:
        DistillationError: the shares do not fit into 1.

    >>> phases = ThreePhases(10, self_study=0.2, co_study=0.5)
    >>> [phases.stage(step) for step in (1, 2, 6, 7)]
    ['self-study', 'co-study', 'co-study', 'tutoring']
    """

    total_steps: int
    self_study: float = 0.3
    co_study: float = 0.3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if min(self.self_study, self.co_study) < 0 or self.self_study + self.co_study > 1 or self.total_steps < 1:
            raise DistillationError("self_study and co_study are shares of the steps: at least 0, together at most 1.")

    def stage(self, step: int) -> Stage:
        """The stage that a step, counted from 0, belongs to."""
        if step < round(self.self_study * self.total_steps):
            return "self-study"
        return "co-study" if step < round((self.self_study + self.co_study) * self.total_steps) else "tutoring"

    def loss(
        self,
        step: int,
        outputs: Any,
        teacher_outputs: Any,
        targets: Tensor,
        task_loss: Callable[[Any, Any], Tensor] = cross_entropy,
    ) -> Tensor:
        """The loss of a step, float32 []: its gradient reaches the teacher in co-study alone.

        Args:
            step: counted from 0.
            outputs: of the student.
            teacher_outputs: of the teacher; with gradients in co-study, and in self-study not read.
            targets: int64 [...].
            task_loss: of outputs and targets.
        """
        stage, mask = self.stage(step), None
        loss = task_loss(outputs, targets)
        if stage == "self-study":
            return loss
        student, guide = logits_of(outputs), logits_of(teacher_outputs)
        if targets.shape == student.shape[:-1]:
            mask = targets != IGNORED
        loss = loss + kl_divergence(student, guide, temperature=self.temperature, mask=mask)
        if stage == "tutoring":
            return loss
        return (
            loss
            + task_loss(teacher_outputs, targets)
            + kl_divergence(guide, student, temperature=self.temperature, mask=mask)
        )
