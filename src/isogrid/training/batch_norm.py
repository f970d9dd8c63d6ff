"""Batch norm after training: statistics that belong to the weights as they are now."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from isogrid.errors import PlanError
from isogrid.layers.batch_norm import AbsorbedBatchNorm
from isogrid.planning.batches import filled_batches, run_batch
from isogrid.planning.evaluating import evaluating
from isogrid.planning.state import prepared_state

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> nn.Module:
    """Replace the running statistics of all batch norms by averages over batches, each of which counts the same.

    Running averages of training lag behind weights that oscillate between codes; Nagel et al., "Overcoming
    Oscillations in Quantization-Aware Training" (2022), found this to repair most of what they cost. Mean and
    (unbiased) variance are averaged over batches, without momentum, while everything else is as in evaluation.

    Args:
        model: prepared and calibrated; changed in place and returned.
        batches, forward: as for `isogrid.calibrate`. Use batches of the size that was trained on.

    Raises:
        PlanError: the model is not prepared, or has no batch norm with running statistics.
        NotCalibratedError: there are no batches, or one is empty.

    >>> import isogrid as ig
    >>> model, x = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    >>> model = ig.calibrate(ig.prepare(model, ig.plan(model, example_inputs=(x,))), [x])
    >>> int(reestimate_batch_norm(model, [x, x])[1].num_batches_tracked)
    2
    """
    arguments = prepared_state(model).plan.arguments
    norms: list[Any] = [m for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not norms:
        raise PlanError("The model has no batch norm with running statistics, so there is nothing to estimate.")
    frozen = {norm: norm.statistics_are_frozen for norm in norms if isinstance(norm, AbsorbedBatchNorm)}
    momenta = {norm: norm.momentum for norm in norms}
    with evaluating(model):
        try:
            for norm in norms:
                norm.momentum = None
                norm.training = True  # of the norm alone, not of the quantizers that it may own
            for norm in frozen:
                norm.statistics_are_frozen = False
            with torch.no_grad():
                for number, batch in enumerate(filled_batches(batches, "to estimate statistics from")):
                    if not number:
                        for norm in norms:
                            norm.reset_running_stats()
                    run_batch(model, batch, arguments) if forward is None else forward(model, batch)
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
            for norm, flag in frozen.items():
                norm.statistics_are_frozen = flag
    return model
