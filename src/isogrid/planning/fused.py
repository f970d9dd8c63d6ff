"""Layers that a runtime computes as one: they are stored alike, down to the scales that the one layer has once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil, log2

import torch
from torch import Tensor

from isogrid.errors import PlanError
from isogrid.formats import Format, PerTensor, named_format
from isogrid.planning.choice import Choice

NVFP4 = "nvfp4"
"""The format whose scale of scales depends on the weights; `nvfp4:global=N` is the same with a given one."""


def fused_with(names: Iterable[str], together: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """For each layer that is computed together with others, the names of all of them.

    Args:
        names: paths of layers.
        together: the last parts of the paths of layers that a runtime joins where they are siblings.

    >>> fused_with(["a.q_proj", "a.v_proj", "a.o_proj", "b.q_proj"], [("q_proj", "k_proj", "v_proj")])
    {'a.q_proj': ('a.q_proj', 'a.v_proj'), 'a.v_proj': ('a.q_proj', 'a.v_proj')}
    """
    found: dict[tuple[str, Sequence[str]], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for group in together:
            if leaf in group:
                found.setdefault((parent, group), []).append(name)
    return {name: tuple(members) for members in found.values() if len(members) > 1 for name in members}


def fuse(
    choices: Mapping[str, Choice], fused: Mapping[str, Sequence[str]], weight: Callable[[str], Tensor], runtime: str
) -> dict[str, Choice]:
    """The choices with what layers that are computed as one share: NVFP4's scale of scales.

    Args:
        choices: by layer or operation; those that stay float are none.
        fused: of `fused_with`.
        weight: of a layer, by its name.
        runtime: its name, for messages.

    Raises:
        PlanError: layers that are computed as one are to be stored differently.
    """
    found = dict(choices)
    for name, members in {**{name: (name,) for name in choices}, **fused}.items():
        asked = {_wish(choices.get(member)): member for member in members}
        if len(asked) > 1:
            wishes = ", ".join(f"{member!r} as {wish}" for wish, member in asked.items())
            raise PlanError(
                f"{runtime} computes {', '.join(members)} as one layer, but they are to be stored differently: "
                f"{wishes}. Write one rule that matches all of them."
            )
        if name in choices and choices[name].weight == NVFP4:
            found[name] = replace(choices[name], weight=nvfp4_name([weight(member) for member in members]))
    return found


def _wish(choice: Choice | None) -> str:
    return "float" if choice is None else f"{choice.weight} ({choice.scale}) on {choice.activation or 'float'}"


def has_one_scale(fmt: Format) -> bool:
    """Whether a format has one scale for a whole tensor, so that layers computed as one have one in all."""
    return isinstance(fmt.granularity, PerTensor) and fmt.scale is not None


def nvfp4_name(weights: Sequence[Tensor]) -> str:
    """NVFP4 with the scale of scales that weights which are computed as one share.

    It is a power of two, so that runtimes which divide by its reciprocal and those which multiply by it get one result,
    and the least by which the largest scale that the weights need stays on FP8's grid, with a factor of two to spare
    for training.

    Raises:
        PlanError: the weights have no values.

    >>> nvfp4_name([torch.tensor([0.5, -1.0])])
    'nvfp4:global=-10'
    """
    if any(weight.is_meta for weight in weights):
        raise PlanError(
            "NVFP4 takes the scale of its scales from the weights, and these are on the meta device. Load them first: "
            "model.to_empty(device='cpu'), then a checkpoint."
        )
    largest = max(float(weight.detach().abs().max()) for weight in weights)
    fmt = named_format(NVFP4)
    assert fmt.scale is not None
    reach = fmt.grid.highest * fmt.scale.grid.highest
    exponent = ceil(log2(2 * largest / reach)) if 0 < largest < torch.inf else 0
    return f"{NVFP4}:global={exponent}"
