"""SpinQuant: rotations that are learned (Liu et al., arXiv 2405.16406)."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from itertools import cycle, islice
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from isogrid.errors import NonFiniteError, PlanError
from isogrid.initialization.network import ExampleInputs, can_write_weight, network_of
from isogrid.initialization.rotation import Turn, chosen_rotations, move_gains, turned_weight, turns_of
from isogrid.initialization.spaces import Space, nothing_turns, spaces_of
from isogrid.planning.batches import filled_batches, run_batch
from isogrid.planning.plan import Plan
from isogrid.planning.prepare import prepare
from isogrid.planning.site_weights import weight_at
from isogrid.planning.state import weight_quantizers


def learn_rotations(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    example_inputs: ExampleInputs,
    calibrate: Callable[[nn.Module], object] = lambda model: None,
    steps: int = 100,
    lr: float = 1.5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Rotations under which the quantised model has the least loss, for `isogrid.rotate`.

    A copy of the model is prepared by the plan. Its weights are the given ones turned, and nothing but the rotations
    trains, along the Cayley transform (Li et al., arXiv 2002.01113), as in the paper; the ranges of the weights follow.

    Args:
        model: float; it is not changed.
        plan: of this model.
        batches: of data, as for `isogrid.calibrate`; gone through again if there are fewer than steps.
        loss: of (outputs, batch).
        example_inputs: as for `isogrid.plan`.
        calibrate: sets the ranges of activations of the prepared copy, where the plan has any that are not dynamic:
            `lambda model: isogrid.calibrate(model, batches)`. It is called before every step.
        steps: 100 in the paper, with batches of 8.
        lr: the largest step; steps are shorter where the gradient is large.
        seed: of the rotations to start from, which are those of `isogrid.rotate`.

    Returns:
        A rotation [size, size] float64 by the name of each space.

    Raises:
        PlanError: nothing can be turned, or a layer that would be does not have its weight to itself.
        NotCalibratedError: there are no batches, or one is empty.
        NonFiniteError: the loss is NaN or infinite.

    >>> import isogrid as ig
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
    ...     def forward(self, x):
    ...         return x + self.down(self.up(self.norm(x)).relu())
    >>> model, x = nn.Sequential(nn.Linear(32, 32), Block(), nn.RMSNorm(32), nn.Linear(32, 2)), torch.ones(1, 32)
    >>> plan = ig.plan(model, scheme="w4a16", example_inputs=(x,))
    >>> found = learn_rotations(model, plan, [x], lambda y, x: y.square().mean(), example_inputs=(x,), steps=2)
    >>> {name: tuple(rotation.shape) for name, rotation in found.items()}
    {'0': (32, 32)}
    """
    data = list(filled_batches(batches, "to learn rotations with"))
    copy = deepcopy(model).float().requires_grad_(False)
    spaces, rotations = _with_turned_weights(copy, example_inputs, seed)
    prepare(copy, plan).eval()
    turn_biases = _turning_biases(copy, spaces, rotations)
    for batch in islice(cycle(data), steps):
        turn_biases()
        calibrate(copy)
        for name, quantizer in weight_quantizers(copy).items():
            quantizer.fit(weight_at(copy, plan, f"{name.rpartition('.')[0]}.weight").detach())
        found = loss(run_batch(copy, batch, plan.arguments), batch)
        if not bool(found.isfinite()):
            raise NonFiniteError(f"The loss is {float(found.detach())}. Look at the batch, or take a smaller lr.")
        gradients = torch.autograd.grad(found, list(rotations), allow_unused=True)
        with torch.no_grad():
            for space, rotation, gradient in zip(spaces, rotations, gradients, strict=True):
                if gradient is not None:
                    rotation.copy_(cayley_step(rotation, gradient, lr, space.keeps_mean))
    return {space.name: rotation.detach().double() for space, rotation in zip(spaces, rotations, strict=True)}


def cayley_step(rotation: Tensor, gradient: Tensor, lr: float, keeps_mean: bool = False) -> Tensor:
    """A step of descent from an orthogonal matrix to another, both [n, n].

    Along `(I + a/2 A)^-1 (I - a/2 A) R` with the skew-symmetric `A = G R^T - R G^T`, and the step `a` at most `lr` and
    at most the inverse of A's norm.

    Args:
        rotation, gradient: R and G.
        lr: the largest step.
        keeps_mean: also stay among those that leave the vector of ones where it is.

    >>> step = cayley_step(torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), lr=0.5)
    >>> bool(torch.allclose(step @ step.T, torch.eye(2))), bool(step[0, 1] < 0)
    (True, True)
    """
    r, g, unit = rotation.double(), gradient.double(), torch.eye(len(rotation), dtype=torch.float64)
    unit = unit.to(rotation.device)
    skew = g @ r.T - r @ g.T
    if keeps_mean:
        centred = unit - 1 / len(unit)
        skew = centred @ skew @ centred
    size = min(lr, 1 / max(float(torch.linalg.matrix_norm(skew, 1)), 1e-12))
    moved: Tensor = torch.linalg.solve(unit + size / 2 * skew, (unit - size / 2 * skew) @ r)
    return moved.to(rotation.dtype)


def _with_turned_weights(
    model: nn.Module, example_inputs: ExampleInputs, seed: int
) -> tuple[list[Space], nn.ParameterList]:
    """Let rotations that train turn a model's weights whenever it runs; returns the spaces and a rotation for each."""
    with network_of(model, example_inputs) as network:
        spaces, kept = spaces_of(network)
        if not spaces:
            raise nothing_turns(kept)
        for space in spaces:
            move_gains(network, space)
    start = chosen_rotations(spaces, {}, Generator().manual_seed(seed))
    rotations = nn.ParameterList(nn.Parameter(start[space.name].float()) for space in spaces)
    names = [space.name for space in spaces]
    modules: dict[str, Any] = dict(model.named_modules())
    for path, turn in turns_of(spaces).items():
        layer = modules.get(path)
        tied = next((space.tied for space in spaces if path in space.tables and space.tied), ())
        if layer is None or "weight" not in layer._parameters or not can_write_weight(layer) or tied:
            raise PlanError(
                f"{path!r} does not have its weight to itself{', but with ' + ', '.join(tied) if tied else ''}. "
                "Give each layer a weight of its own, or rotate without learning."
            )
        parametrize.register_parametrization(layer, "weight", _Turned(turn, names, rotations), unsafe=True)
    return spaces, rotations


def _turning_biases(model: nn.Module, spaces: list[Space], rotations: nn.ParameterList) -> Callable[[], None]:
    """A function that turns the biases of what writes the spaces anew; the layers hold them as plain tensors."""
    biases: list[tuple[Any, Tensor, Tensor]] = []
    for space, rotation in zip(spaces, rotations, strict=True):
        for path in space.writers:
            layer: Any = model.get_submodule(path)
            if layer.bias is not None:
                biases.append((layer, layer._parameters.pop("bias"), rotation))

    def turn() -> None:
        for layer, bias, rotation in biases:
            layer.bias = turned_weight(bias, Turn(columns=""), {"": rotation})

    return turn


class _Turned(nn.Module):
    """A weight turned by rotations that train."""

    def __init__(self, turn: Turn, names: list[str], rotations: nn.ParameterList):
        super().__init__()
        self.turn, self.names, self.rotations = turn, names, rotations

    def forward(self, weight: Tensor) -> Tensor:
        by_name: Mapping[str, Tensor] = dict(zip(self.names, self.rotations, strict=True))
        return turned_weight(weight, self.turn, by_name)
