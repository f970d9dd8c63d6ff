"""Losses inside a model: what layers put out, and how positions relate to each other there."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from isogrid.errors import DistillationError
from isogrid.training.divergences import kl_divergence
from isogrid.training.outputs import logits_of
from isogrid.training.teachers import OtherTeacher, SelfTeacher


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared error of a layer's output relative to its size: mean((s − t)²) / mean(t²), float32 [].

    Args:
        student, teacher: float, of one shape; the teacher gets no gradient.

    Raises:
        DistillationError: they have different shapes.

    >>> feature_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor(0.5000)
    """
    _check_shapes(student, teacher)
    target = teacher.detach().float()
    power = target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (student.float() - target).square().mean() / power


def relation_loss(student: Tensor, teacher: Tensor, heads: int = 1) -> Tensor:
    """How far positions relate to each other otherwise than in the teacher; for outputs of projections in attention.

    For each of `heads` parts of the features, A of [positions, features / heads], the relations are the rows of
    softmax(A·Aᵀ / sqrt(features / heads)); the loss is the mean of their forward divergences, as MiniLMv2 has it for
    queries, keys and values (arXiv 2012.15828).

    Args:
        student, teacher: float [..., positions, features].
        heads: divides the features.

    Raises:
        DistillationError: the shapes differ, or heads does not divide the features.

    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> relation_loss(x, x), round(float(relation_loss(0.0 * x, x)), 4)
    (tensor(0.), 0.0588)
    """
    if student.shape[:-1] != teacher.shape[:-1] or student.dim() < 2:
        _check_shapes(student, teacher)
    for features in (student.shape[-1], teacher.shape[-1]):
        if features % heads:
            raise DistillationError(f"{heads} heads do not divide {features} features.")
    return kl_divergence(_relations(student, heads), _relations(teacher.detach(), heads))


def _relations(x: Tensor, heads: int) -> Tensor:
    """Logits of the relations, float32 [..., heads, positions, positions]."""
    parts = x.float().reshape(*x.shape[:-1], heads, -1).transpose(-2, -3)
    return parts @ parts.transpose(-1, -2) * (1.0 / math.sqrt(parts.shape[-1]))


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise DistillationError(
            f"A layer puts out {list(student.shape)} in the student and {list(teacher.shape)} in the teacher. Compare "
            "layers of one shape, and run both on the same batch."
        )


class LayerLosses:
    """Losses on what layers put out, beside the one on logits.

    Keep it while training; it watches both models run, and adds up what their latest runs give. A prepared layer puts
    out what follows the batch norm and the clamp inside it: of another model as teacher, compare blocks that end later.

    Args:
        model: the student.
        teacher: of `isogrid.teacher`.
        features: weights of `feature_loss`, by the names of modules.
        relations: weights of `relation_loss`, by the names of modules.
        heads: of the relations.

    Raises:
        DistillationError: a model has no such module.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> x = torch.linspace(-1, 1, 8).reshape(2, 4)
    >>> plan = ig.plan(model, scheme="w4a8", example_inputs=(x,))
    >>> guide = ig.teacher(ig.calibrate(ig.prepare(model, plan), [x]))
    >>> inside = LayerLosses(model, guide, features={"0": 1.0})
    >>> targets = guide(x)
    >>> loss = ig.Distillation()(model(x), targets) + inside.loss()
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Any,
        features: Mapping[str, float] | None = None,
        relations: Mapping[str, float] | None = None,
        heads: int = 1,
    ):
        self.features, self.relations, self.heads = dict(features or {}), dict(relations or {}), heads
        self._teacher = teacher
        self._seen: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        shared = isinstance(teacher, SelfTeacher) and teacher.model is model
        other = teacher.model if isinstance(teacher, OtherTeacher | SelfTeacher) else teacher
        self._handles: list[RemovableHandle] = []
        for name in dict.fromkeys([*self.features, *self.relations]):
            self._watch(model, name, None if shared else "student")
            if not shared:
                self._watch(other, name, "teacher")

    def loss(self) -> Tensor:
        """The weighted sum, float32 []; both models must have run since the last call.

        Raises:
            DistillationError: a layer did not run, or its outputs have another shape in the teacher.
        """
        student, teacher = self._seen["student"], self._seen["teacher"]
        missing = [name for name in (*self.features, *self.relations) if name not in student or name not in teacher]
        if missing:
            raise DistillationError(f"{missing[0]} has not run in both models since the last loss. Run both first.")
        total = torch.zeros(())
        for name, weight in self.features.items():
            total = total + weight * feature_loss(student[name], teacher[name])
        for name, weight in self.relations.items():
            total = total + weight * relation_loss(student[name], teacher[name], self.heads)
        student.clear()
        teacher.clear()
        return total

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, model: nn.Module, name: str, whose: str | None) -> None:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise DistillationError(f"There is no module {name!r} in {type(model).__name__}. {error}") from error
        teacher, seen = self._teacher, self._seen

        # A plain function, so that a copy of the model does not copy the teacher with its hooks.
        def keep(ran: nn.Module, inputs: Any, outputs: Any) -> None:
            side = whose or ("teacher" if teacher.running else "student")
            if ran is module and (side == "teacher" or ran.training):
                seen[side][name] = logits_of(outputs)

        self._handles.append(module.register_forward_hook(keep))
