"""Calibration: a good start for every range, from data."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from isogrid.errors import NonFiniteError, NotCalibratedError
from isogrid.layers.weights import refresh_weights
from isogrid.planning.batches import filled_batches, run_batch
from isogrid.planning.evaluating import evaluating
from isogrid.planning.site_weights import weight_at
from isogrid.planning.state import activation_quantizers, prepared_state, quantizers, weight_quantizers
from isogrid.quantizers.quantizer import Quantizer


def calibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> nn.Module:
    """Set the ranges of all quantizers: weights from themselves, activations from what batches make flow.

    The model runs in evaluation mode, in float, without gradients; its flags are as before afterwards.

    Args:
        model: prepared.
        batches: each has the model's arguments: a tensor, a tuple or list, or a dictionary. Those that the plan's
            example inputs had are passed: of a tuple or list as many leading elements, of a dictionary the entries of
            their names, so that a loader of inputs and labels works as it is.
        forward: how to run the model on a batch, where that is not enough.

    Raises:
        NotCalibratedError: there are no batches, one is empty, or a site saw nothing.
        PlanError: a batch lacks an argument.
        NonFiniteError: NaN or infinity flows through a site, which is named.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> x = torch.linspace(-1.0, 1.0, 32).reshape(8, 4)
    >>> ig.prepare(model, ig.plan(model, scheme="w8a8", example_inputs=(x,)))[0].input_quantizer.is_calibrated
    False
    >>> calibrate(model, [x])[0].input_quantizer.is_calibrated
    True
    """
    arguments = prepared_state(model).plan.arguments
    found = quantizers(model)
    with evaluating(model), _observing(found.values()):
        with torch.no_grad(), naming_where(model):
            for batch in filled_batches(batches, "to calibrate with"):
                run_batch(model, batch, arguments) if forward is None else forward(model, batch)
        fit_activations(model)
        refresh_weights(model)
        for name, quantizer in weight_quantizers(model).items():
            site = f"{name.rpartition('.')[0]}.weight"
            quantizer.fit(weight_at(model, prepared_state(model).plan, site))
    return model


@contextmanager
def _observing(found: Collection[Quantizer]) -> Iterator[None]:
    """While open, quantizers look on instead of quantising; what they saw before is forgotten."""
    switches = {quantizer: (quantizer.enabled, quantizer.observing) for quantizer in found}
    try:
        for quantizer in found:
            quantizer.enabled, quantizer.observing = False, True
            quantizer.train()  # observers look on in training only, so that evaluation leaves no trace
            if quantizer.observer is not None:
                quantizer.observer.reset()
        yield
    finally:
        for quantizer, (enabled, observing) in switches.items():
            quantizer.enabled, quantizer.observing = enabled, observing


def fit_activations(model: nn.Module) -> None:
    """Set the ranges of all activations from what their observers have seen.

    Raises:
        NotCalibratedError: a site, which is named, has seen nothing.
    """
    for name, quantizer in activation_quantizers(model).items():
        try:
            quantizer.fit_observed()
        except NotCalibratedError as error:
            raise NotCalibratedError(
                f"{name} saw nothing in the batches, though it did in the example inputs of the plan. Calibrate with "
                "batches that reach it."
            ) from error


@contextmanager
def naming_where(model: nn.Module) -> Iterator[None]:
    """While open, a NonFiniteError also says in which module of the model it arose."""
    paths = {module: name for name, module in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        if module in paths:
            running.append(paths[module])

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if module in paths:
            running.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"At {running[-1] or 'the model'}: {error}" if running else str(error)) from error
    finally:
        for hook in hooks:
            hook.remove()
