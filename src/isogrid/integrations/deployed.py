"""Evaluation of what will be deployed: a prepared model that, in evaluation mode, is its own integer twin."""

import types
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from isogrid.api import convert
from isogrid.errors import CaptureError
from isogrid.planning.state import prepared_state, steps_done
from isogrid.training.teachers import TEACHES

NAME = "isogrid_deployed"
"""The attribute of a model that evaluates as deployed."""


class Deployed:
    """The integer twin of a prepared model, made when it is first asked for after a step of training.

    A copy of the model does not evaluate as deployed: the twin itself is such a copy.
    """

    def __init__(self, model: nn.Module):
        self._model, self._forward = model, model.forward
        self._running = False
        self._twin: nn.Module | None = None
        self._step = -1

    def twin(self) -> nn.Module:
        """`convert(model)` of the model as it is after this many steps."""
        step = int(steps_done(self._model))
        if self._twin is None or self._step != step:
            self._twin, self._step = None, step  # before the new one, which is as large, the old one goes
            # Loops put forwards of their own on the model, which would lead a copy back to the model itself.
            patched = self._model.forward
            self._model.forward = self._forward
            try:
                self._twin = convert(self._model)
            finally:
                self._model.forward = patched
        return self._twin

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the twin.

        Raises:
            CaptureError: a copy of the model leads back to the model.
        """
        if self._running:
            raise CaptureError(
                "A loop has replaced the model's forward, and a copy of the model calls the original. Save the model "
                "and take isogrid.restore(float_model, folder) for export and verification."
            )
        self._running = True
        try:
            return self.twin()(*args, **kwargs)
        finally:
            self._running = False

    def forget(self) -> None:
        """Give the memory of the twin back; the next evaluation makes it anew."""
        self._twin = None

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> None:
    return None


def evaluate_deployed(model: nn.Module) -> Deployed:
    """Let a prepared model compute in evaluation mode what `convert(model)` computes; in training nothing changes.

    So every loop's evaluation gives the figures of the deployed model, and stopping early is stopping on them.

    Args:
        model: prepared.

    Returns:
        What holds the twin; call `forget` when an evaluation is over.

    Raises:
        PlanError: the model is not prepared.

    >>> import isogrid as ig, torch
    >>> model, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(1, 4)
    >>> model = ig.calibrate(ig.prepare(model, ig.plan(model, scheme="w8a8", example_inputs=(x,))), [x])
    >>> deployed = evaluate_deployed(model)
    >>> bool((model.eval()(x) == ig.convert(model)(x)).all())
    True
    """
    prepared_state(model)
    found = vars(model).get(NAME)
    if isinstance(found, Deployed):
        return found
    deployed = Deployed(model)
    object.__setattr__(model, NAME, deployed)
    own: Any = model.forward
    model.forward = types.MethodType(_routed(own.__func__), model)
    return deployed


def _routed(plain: Callable[..., Any]) -> Callable[..., Any]:
    # Trainers look at the signature to know which columns of the data a model takes.
    @wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        deployed = vars(self).get(NAME)
        if deployed is None or self.training or vars(self).get(TEACHES):
            return plain(self, *args, **kwargs)
        return deployed.run(*args, **kwargs)

    return forward
