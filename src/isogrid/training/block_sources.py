"""Where blocks come from for training, and where they go afterwards."""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from isogrid.training.block_files import BlockFiles
from isogrid.training.blocks import Call
from isogrid.training.checkpoint import load_state


class BlockSource(Protocol):
    """A model whose blocks are there one at a time.

    Attributes:
        model: what lies around the blocks is there.
        paths: of the blocks, in order.
        device: where blocks train.
    """

    model: nn.Module
    paths: tuple[str, ...]
    device: torch.device

    def open(self, index: int) -> nn.Module:
        """A block, prepared and ready to train."""
        ...

    def close(self, index: int, block: nn.Module, files: BlockFiles) -> None:
        """Write a trained block down and let it go."""
        ...

    def restore(self, index: int, files: BlockFiles) -> None:
        """Take over a block that was trained before."""
        ...

    def on_device(self, call: Call) -> Call:
        """A call with its tensors where blocks train."""
        ...


class InMemory:
    """The blocks of a prepared model, which stay where they are but for the one that trains.

    Args:
        model: prepared.
        paths: of its blocks.
        device: where a block trains; None for where it is.
    """

    def __init__(self, model: nn.Module, paths: tuple[str, ...], device: torch.device | str | None):
        self.model, self.paths = model, paths
        self._home = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.device = self._home if device is None else torch.device(device)

    def open(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.paths[index]).to(self.device)

    def close(self, index: int, block: nn.Module, files: BlockFiles) -> None:
        files.write_block(index, dict(block.state_dict()))
        block.to(self._home)

    def restore(self, index: int, files: BlockFiles) -> None:
        load_state(self.model.get_submodule(self.paths[index]), files.read_block(index), files.block_file(index))

    def on_device(self, call: Call) -> Call:
        return moved(call, self.device)


def moved(call: Call, device: torch.device) -> Call:
    """A call with its tensors on a device; what is there already stays what it is."""
    places: dict[int, Any] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = places.setdefault(id(tensor), tensor.to(device))
        return found

    args, kwargs = tree_map_only(torch.Tensor, move, (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs, hidden=move(call.hidden))
