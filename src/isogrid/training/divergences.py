"""Kullback-Leibler divergences between a teacher's and a student's logits, with their gradients in closed form.

One pass over the logits computes loss and gradient, some rows at a time: beside the two logits there is one tensor of
their size, the gradient, which is what cross-entropy needs too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isogrid.errors import DistillationError, NonFiniteError

CHUNK = 1 << 20
"""Logits that are computed at a time, about."""


@dataclass(frozen=True)
class TopK:
    """A teacher's most probable classes, and what is left for all others.

    Invariants:
        exp(log_probabilities).sum(-1) + exp(log_rest) == 1

    Attributes:
        log_probabilities: float32 [..., k], of the most probable classes.
        classes: integers [..., k], which they are.
        log_rest: float32 [...], of the probability of all other classes together; -inf where k is all of them.
        vocabulary: classes there are.
        temperature: that the teacher's logits were divided by.

    >>> top = TopK.of(torch.tensor([[2.0, 1.0, 0.0]]), k=2)
    >>> top.classes.tolist(), round(float(top.log_rest.exp()), 4)
    ([[0, 1]], 0.09)
    """

    log_probabilities: Tensor
    classes: Tensor
    log_rest: Tensor
    vocabulary: int
    temperature: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits that this stands for."""
        return (*self.classes.shape[:-1], self.vocabulary)

    @staticmethod
    def of(logits: Tensor, k: int, temperature: float = 1.0) -> "TopK":
        """From logits float [..., vocabulary]; k is at most the vocabulary.

        Raises:
            NonFiniteError: the logits of a position are no distribution.
        """
        check_finite(logits)
        logs = torch.log_softmax(logits.detach().float() / temperature, -1)
        top = logs.topk(min(k, logs.shape[-1]), -1)
        rest = logs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
        return TopK(top.values, top.indices, rest, logs.shape[-1], temperature)


def kl_divergence(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    temperature: float = 1.0,
    reverse: float = 0.0,
    mask: Tensor | None = None,
    overwrite_teacher: bool = False,
) -> Tensor:
    """The mean divergence a position between the distributions of a teacher and of a student.

    With p = softmax(teacher / T) and q = softmax(student / T), a position's loss is T²·((1 − r)·KL(p‖q) + r·KL(q‖p)),
    KL(p‖q) = Σ p·log(p / q). T² keeps the size of the gradient (Hinton et al., arXiv 1503.02531); r = 0 is the forward
    divergence of NVIDIA's QAD (arXiv 2601.20088), and a share between blends both as BitDistiller's CAKLD does (arXiv
    2402.10631), whose r is the teacher's mean probability of the right tokens, see `confidence`.

    Of a `TopK` with classes K, Σ over K of p·log(p / q) + p_r·log(p_r / q_r), where p_r = 1 − Σ p and q_r = 1 − Σ q
    over K: all other classes count as one. It is never above the divergence of all classes, and equal where K is all.

    Args:
        student: float [..., vocabulary].
        teacher: float [..., vocabulary], or a TopK of such logits; it gets no gradient.
        temperature: T.
        reverse: r, from 0 to 1.
        mask: bool [...], positions that count; all, where not given.
        overwrite_teacher: compute the gradient where the teacher's logits are, which spares a tensor of their size;
            they are not to be read afterwards.

    Returns:
        float32 [], 0 where no position counts.

    Raises:
        DistillationError: the two have different vocabularies, or a TopK was made at another temperature.
        NonFiniteError: the teacher's logits hold NaN or infinity at a position that counts.

    >>> logits = torch.tensor([[0.0, 0.0]], requires_grad=True)
    >>> kl_divergence(logits, torch.tensor([[0.0, 1.0]]).log())
    tensor(0.6931, grad_fn=<_DivergenceBackward>)
    """
    check_fits(student, teacher, temperature)
    if temperature <= 0 or not 0 <= reverse <= 1:
        raise DistillationError("A temperature is above 0, and the reverse share is from 0 to 1.")
    counts = student.new_ones(student.shape[:-1], dtype=torch.bool) if mask is None else mask.to(student.device)
    if counts.shape != student.shape[:-1]:
        raise DistillationError(f"The mask has shape {list(counts.shape)}, logits have {list(student.shape)}.")
    rows = student.reshape(-1, student.shape[-1])
    loss: Tensor = _divergence(
        rows, _rows(teacher, student.device), counts.reshape(-1), temperature, reverse, overwrite_teacher
    )
    return loss


def confidence(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> float:
    """A teacher's mean probability of the right classes: CAKLD's share of the reverse divergence.

    BitDistiller (arXiv 2402.10631) computes it once, over some of the training data.

    Args:
        logits: float [..., vocabulary].
        targets: int64 [...]; ignore_index where there is none.

    >>> round(confidence(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([1, -100])), 3)
    0.5
    """
    counts = targets != ignore_index
    logs = torch.log_softmax(logits.detach().float(), -1)[counts]
    return float(logs.gather(-1, targets[counts].unsqueeze(-1)).exp().mean())


def check_finite(logits: Tensor, counts: Tensor | None = None) -> None:
    """Raise NonFiniteError where a position's teacher logits are no distribution; -inf for some classes is."""
    totals = logits.logsumexp(-1)
    finite = torch.isfinite(totals) if counts is None else torch.isfinite(totals) | ~counts
    if not bool(finite.all()):
        raise _no_distribution()


def check_fits(student: Tensor, teacher: Tensor | TopK, temperature: float = 1.0) -> None:
    """Raise DistillationError where a student's logits cannot be compared with a teacher's."""
    if student.shape[-1] != teacher.shape[-1]:
        raise DistillationError(
            f"The teacher has {teacher.shape[-1]} classes and the student {student.shape[-1]}: another vocabulary. "
            "Use a teacher with the student's tokenizer or classes."
        )
    if tuple(student.shape) != tuple(teacher.shape):
        raise DistillationError(
            f"The teacher's logits have shape {list(teacher.shape)} and the student's {list(student.shape)}. "
            "Run both on the same batch."
        )
    if isinstance(teacher, TopK) and teacher.temperature != temperature:
        raise DistillationError(
            f"The teacher's top classes were computed at temperature {teacher.temperature:g}, and the loss has "
            f"{temperature:g}. Compute them anew, or use that temperature."
        )


def _no_distribution() -> NonFiniteError:
    return NonFiniteError(
        "The teacher's logits hold NaN or infinity. Look at the batch and at the teacher's precision: float16 "
        "overflows where bfloat16 does not."
    )


def _rows(teacher: Tensor | TopK, device: torch.device) -> tuple[Tensor, ...]:
    """The teacher's tensors with one leading dimension."""
    if isinstance(teacher, Tensor):
        return (teacher.detach().reshape(-1, teacher.shape[-1]).to(device),)
    k = teacher.classes.shape[-1]
    parts = (
        teacher.log_probabilities.reshape(-1, k),
        teacher.classes.reshape(-1, k).long(),
        teacher.log_rest.reshape(-1),
    )
    return tuple(part.to(device) for part in parts)


def _teacher_logs(rows: tuple[Tensor, ...], student_logs: Tensor, temperature: float) -> Tensor:
    """The teacher's log-probabilities [rows, vocabulary].

    What a TopK leaves open is spread as the student spreads it: loss and gradient are then those of the two sums.
    """
    if len(rows) == 1:
        return torch.log_softmax(rows[0].float() / temperature, -1)
    logs, classes, rest = rows
    student_rest = student_logs.scatter(-1, classes, -torch.inf).logsumexp(-1)
    # Where all classes are among the top ones, nothing of this is left after the scatter.
    spread = student_logs + torch.where(student_rest.isfinite(), rest - student_rest, 0.0).unsqueeze(-1)
    return spread.scatter(-1, classes, logs)


class _Divergence(torch.autograd.Function):
    """Mean divergence over the rows that count; the gradient is computed beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: tuple[Tensor, ...],
        counts: Tensor,
        temperature: float,
        reverse: float,
        overwrite: bool,
    ) -> Tensor:
        gradient = None
        if ctx.needs_input_grad[0]:
            fits = overwrite and len(teacher) == 1 and teacher[0].dtype == student.dtype
            gradient = teacher[0] if fits else torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        number = counts.sum().clamp(min=1)
        step = max(1, CHUNK // max(1, student.shape[-1]))
        for start in range(0, len(student), step):
            chunk = slice(start, start + step)
            student_logs = torch.log_softmax(student[chunk].float() / temperature, -1)
            teacher_logs = _teacher_logs(tuple(part[chunk] for part in teacher), student_logs, temperature)
            losses, slope = _row_losses(student_logs, teacher_logs, reverse)
            if bool((teacher_logs.isnan().any(-1) & counts[chunk]).any()):
                raise _no_distribution()
            total += losses.where(counts[chunk], 0.0).sum() * temperature**2
            if gradient is not None:
                gradient[chunk] = (slope * (temperature / number)).where(counts[chunk, None], 0.0)
        ctx.gradient = gradient
        return total / number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place: it may be the largest tensor of a step
        if gradient is None:
            raise DistillationError("A divergence goes backward once. Add losses up before calling backward.")
        return gradient.mul_(scale), None, None, None, None, None


_divergence: Callable[..., Tensor] = _Divergence.apply


def _row_losses(student_logs: Tensor, teacher_logs: Tensor, reverse: float) -> tuple[Tensor, Tensor]:
    """Divergence of each row at T = 1, and its slope by the student's logits: q − p, and q·(log(q / p) − KL(q‖p))."""
    q, p = student_logs.exp(), teacher_logs.exp()
    difference = teacher_logs - student_logs
    losses = (p * difference).where(p > 0, 0.0).sum(-1)
    slope = q - p
    if reverse:
        backwards = (-q * difference).where(q > 0, 0.0)
        back = backwards.sum(-1)
        losses = (1 - reverse) * losses + reverse * back
        slope = (1 - reverse) * slope + reverse * (backwards - q * back.unsqueeze(-1))
    return losses, slope
