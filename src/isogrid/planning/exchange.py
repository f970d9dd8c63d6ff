"""Modules put in the places of others."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from isogrid.layers.attention import ProjectedAttention
from isogrid.layers.borrowed import ProductOfPairs, TakenApart, TurnedLinear
from isogrid.layers.experts import SeparateExperts, are_stacked_experts
from isogrid.layers.known_functions import QuickGELU, TanhGELU
from isogrid.layers.recurrent import GRUCell, LSTMCell, RNNCell, UnrolledGRU, UnrolledLSTM, UnrolledRNN

APART: dict[type[nn.Module], type[TakenApart]] = {
    nn.Bilinear: ProductOfPairs,
    nn.GRU: UnrolledGRU,
    nn.GRUCell: GRUCell,
    nn.LSTM: UnrolledLSTM,
    nn.LSTMCell: LSTMCell,
    nn.MultiheadAttention: ProjectedAttention,
    nn.RNN: UnrolledRNN,
    nn.RNNCell: RNNCell,
}
"""Modules of several products, and what they are taken apart into."""

OF_TRANSFORMERS: dict[str, type[TakenApart]] = {
    "transformers.activations.AccurateGELUActivation": TanhGELU,
    "transformers.activations.FastGELUActivation": TanhGELU,
    "transformers.activations.NewGELUActivation": TanhGELU,
    "transformers.activations.QuickGELUActivation": QuickGELU,
    "transformers.pytorch_utils.Conv1D": TurnedLinear,
}
"""Those of transformers, told without its import."""


def exchange(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put every new module wherever the old one was: under all its names, and in lists and dictionaries."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in made:
                parent._modules[name] = made[child]
        for name, value in list(vars(parent).items()):
            holds = not name.startswith("_") and isinstance(value, list | tuple | dict)
            if holds and any(isinstance(leaf, nn.Module) and leaf in made for leaf in tree_leaves(value)):
                vars(parent)[name] = tree_map_only(nn.Module, lambda module: made.get(module, module), value)


def apart_for(model: nn.Module, planned: Collection[str]) -> tuple[str, ...]:
    """The paths of modules that are taken apart and have work in them: layers or operations of these names."""
    paths = (path for path, module in model.named_modules() if isinstance(module, TakenApart))
    return tuple(path for path in paths if any(name.startswith(f"{path}.") for name in planned))


def take_apart(model: nn.Module, paths: tuple[str, ...] | None = None) -> dict[nn.Module, nn.Module]:
    """Take modules of several products apart, in place: those at the paths, or all.

    Returns:
        The old module of each new one; `exchange` puts them back.
    """
    made: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        kind = _apart(module)
        if path and kind is not None and (paths is None or path in paths):
            made[module] = kind.of(module)
    exchange(model, made)
    return {new: old for old, new in made.items()}


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """While open, all modules of several products are taken apart."""
    made = take_apart(model)
    try:
        yield
    finally:
        exchange(model, made)


def _apart(module: nn.Module) -> type[TakenApart] | None:
    if isinstance(module, TakenApart):
        return None
    for kind, parts in APART.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return parts
    if are_stacked_experts(module):
        return SeparateExperts
    return OF_TRANSFORMERS.get(f"{type(module).__module__}.{type(module).__name__}")
