"""Calibration: a good start for every range, from data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import NotCalibratedError, PlanError
from isogrid.planning.state import activation_quantizers, prepared_state, quantizers, weight_quantizers


def calibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> nn.Module:
    """Set the ranges of all quantizers: weights from themselves, activations from what batches make flow.

    The model runs in evaluation mode, in float, without gradients; its flags are as before afterwards.

    Args:
        model: prepared.
        batches: each is the model's arguments: a tensor, a tuple or list of arguments, or a dictionary of keyword
            arguments. Of a tuple or list, as many leading elements are passed as the plan's example inputs were, so
            that a loader of (inputs, labels) works as it is.
        forward: how to run the model on a batch, where that is not enough.

    Raises:
        NotCalibratedError: there are no batches, or a site saw nothing.
        NonFiniteError: NaN or infinity flows through a site, which is named.
    """
    state = prepared_state(model)
    count = len(state.plan.inputs)
    flags = {module: module.training for module in model.modules()}
    switches = {q: (q.enabled, q.observing) for q in quantizers(model).values()}
    seen = False
    try:
        model.eval()
        for name, quantizer in quantizers(model).items():
            quantizer.enabled, quantizer.observing = False, True
            if quantizer.observer is not None:
                quantizer.observer.reset()
                quantizer.observer.name = name
        with torch.no_grad():
            for batch in batches:
                seen = True
                run_batch(model, batch, count) if forward is None else forward(model, batch)
        if not seen:
            raise NotCalibratedError("There is no batch to calibrate with. Pass at least one.")
        _fit(model)
    finally:
        for module, flag in flags.items():
            module.training = flag
        for quantizer, (enabled, observing) in switches.items():
            quantizer.enabled, quantizer.observing = enabled, observing
    return model


def _fit(model: nn.Module) -> None:
    for name, quantizer in activation_quantizers(model).items():
        if quantizer.observer is None:
            continue
        quantizer.observer.synchronize()
        try:
            quantizer.fit_observed()
        except NotCalibratedError as error:
            raise NotCalibratedError(f"{name}: {error}") from error
    for name in weight_quantizers(model):
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        layer.weight_quantizer.fit(layer.weight.detach())


def run_batch(model: nn.Module, batch: Any, count: int) -> Any:
    """Run a model on a batch as a loader gives it; see `arguments_of`.

    >>> run_batch(nn.Identity(), (torch.ones(1), "label"), 1)
    tensor([1.])
    """
    return model(**batch) if isinstance(batch, Mapping) else model(*arguments_of(batch, count))


def arguments_of(batch: Any, count: int) -> tuple[Any, ...]:
    """The arguments of a model in a batch: a tensor, or the leading elements of a sequence.

    Args:
        batch: as a loader gives it; labels may follow the inputs.
        count: how many arguments the model takes.

    Raises:
        PlanError: the batch is neither, or too short.
    """
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, Mapping):
        return tuple(batch.values())[:count]
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        if len(batch) < count:
            raise PlanError(f"A batch has {len(batch)} elements and the model takes {count}.")
        return tuple(batch[:count])
    raise PlanError(f"A batch is a tensor, a sequence or a dictionary, not a {type(batch).__name__}.")
