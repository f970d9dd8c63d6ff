"""One trained model for several runtimes: its weights and grids in models that were planned for the others."""

from dataclasses import replace

import torch
from torch import nn

from isogrid.errors import PlanError
from isogrid.formats import IntegerGrid, named_format
from isogrid.planning.plan import Plan
from isogrid.planning.state import prepared_state, quantizers


@torch.no_grad()
def adopt(model: nn.Module, trained: nn.Module) -> nn.Module:
    """Give a prepared model the weights and grids of a trained one; works in place and returns the model.

    Runtimes store the same values as other codes: 0..255 here, -128..127 there. Zero points are moved accordingly, so
    that both models stand on the same grids. Whether both runtimes also round alike is up to the scheme; with
    `portable` they do.

    Args:
        model: a copy of the float model, prepared for another runtime.
        trained: prepared and trained; it is not changed.

    Raises:
        PlanError: the plans differ in more than the codes: another site, another number of bits, an operation that one
            runtime computes and the other does not.

    >>> import copy
    >>> import isogrid as ig
    >>> network, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.ones(1, 8)
    >>> trained, other = (
    ...     ig.prepare(copy.deepcopy(network), ig.plan(network, target, "portable", example_inputs=(x,)))
    ...     for target in ("onnxruntime", "executorch")
    ... )
    >>> ig.calibrate(trained, [(x,)])(x).equal(ig.adopt(other, trained)(x))
    True
    """
    plan, source = prepared_state(model).plan, prepared_state(trained).plan
    shifts = _shifts(plan, source)
    model.load_state_dict(trained.state_dict())
    paths = {quantizer: name for name, quantizer in quantizers(trained).items()}
    mine = quantizers(model)
    for quantizer, path in paths.items():
        own = mine[path]
        if own.zero_point is not None and quantizer.zero_point is not None:
            own.zero_point.copy_(quantizer.zero_point + shifts[str(own.format), str(quantizer.format)])
    return model


def _shifts(plan: Plan, source: Plan) -> dict[tuple[str, str], float]:
    """By how much codes differ that stand for the same value, for each pair of formats."""
    found: dict[tuple[str, str], float] = {}
    if plan.layers != source.layers or plan.operations != source.operations:
        raise _error(plan, source, "the two runtimes do not compute the same layers and operations in integers")
    for site, other in zip(plan.sites, source.sites, strict=True):  # they follow from layers and operations
        if replace(site, format="", reason="") != replace(other, format="", reason=""):
            raise _error(plan, source, f"{site.name!r} and {other.name!r} are not stored alike")
        own, its = named_format(site.format), named_format(other.format)
        grids = own.grid, its.grid
        if not all(isinstance(grid, IntegerGrid) for grid in grids) or own.scale != its.scale:
            same = own == its
        else:
            same = grids[0].highest - grids[0].lowest == grids[1].highest - grids[1].lowest
            same = same and (own.zero_point is None) == (its.zero_point is None)
            same = same and (own.zero_point is not None or own.grid == its.grid)
        if not same:
            raise _error(plan, source, f"{site.name!r} is {site.format} for the one and {other.format} for the other")
        found[str(own), str(its)] = grids[0].lowest - grids[1].lowest
    return found


def _error(plan: Plan, source: Plan, what: str) -> PlanError:
    return PlanError(
        f"A model planned for {plan.target} cannot adopt one planned for {source.target}: {what}. Plan both with the "
        "scheme 'portable' and the same rules."
    )
