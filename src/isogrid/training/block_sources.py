"""Where blocks come from for training, and where they go afterwards."""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from isogrid.layers.coded import why_not_coded
from isogrid.planning.parts import plan_around, plan_of_part
from isogrid.planning.plan import Plan
from isogrid.planning.prepare import prepare, prepare_part
from isogrid.planning.state import STATE_NAME, STEP_NAME, PreparedState
from isogrid.quantizers import Quantizer
from isogrid.training.block_files import BlockFiles
from isogrid.training.blocks import Call
from isogrid.training.checkpoint import load_state
from isogrid.training.codes import code_layers
from isogrid.training.shards import Shards, empty, fill, place


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

    def put_back(self) -> None:
        """Move what `open` has moved back to where it was, whether or not it was trained."""
        ...

    def restore(self, index: int, files: BlockFiles) -> None:
        """Take over a block that was trained before."""
        ...

    def finish(self, files: BlockFiles) -> None:
        """All blocks are trained: make the model whole."""
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
        self._given = None if device is None else torch.device(device)
        self.device = self._given or _device_of(model)
        self._moved: list[tuple[nn.Module, torch.device]] = []

    def open(self, index: int) -> nn.Module:
        block = self.model.get_submodule(self.paths[index])
        self.device = self._given or _device_of(block)
        self._moved = [(module, _device_of(module)) for module in (block, *_borrowed(block))]
        for module, _ in self._moved:
            module.to(self.device)
        return block

    def close(self, index: int, block: nn.Module, files: BlockFiles) -> None:
        files.write_block(index, dict(block.state_dict()))

    def put_back(self) -> None:
        for module, home in self._moved:
            module.to(home)
        self._moved = []

    def restore(self, index: int, files: BlockFiles) -> None:
        load_state(self.model.get_submodule(self.paths[index]), files.read_block(index), files.block_file(index))

    def finish(self, files: BlockFiles) -> None:
        """Nothing to do: the blocks are where they were."""

    def on_device(self, call: Call) -> Call:
        return moved(call, self.device)


def _device_of(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _borrowed(block: nn.Module) -> list[Quantizer]:
    """The quantizers outside a block that modules inside read: those of what other blocks have made."""
    inside = set(block.modules())
    found = [v for module in inside for v in vars(module).values() if isinstance(v, Quantizer) and v not in inside]
    return list(dict.fromkeys(found))


def moved(call: Call, device: torch.device) -> Call:
    """A call with its tensors on a device; what is there already stays what it is."""
    places: dict[int, Any] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = places.setdefault(id(tensor), tensor.to(device))
        return found

    args, kwargs = tree_map_only(torch.Tensor, move, (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs, hidden=move(call.hidden))


class OnDisk:
    """The blocks of a model that is larger than memory: each is read from shards, and its codes take its place.

    What lies around the blocks is read at once and prepared. After the run the model has codes in place of its blocks.

    Args:
        model: float, with its parameters on the meta device and its buffers where they belong, as
            `accelerate.init_empty_weights` makes it.
        plan: of it.
        paths: of its blocks.
        shards: with its weights.
        device: where blocks train and what is around them lives.
    """

    def __init__(self, model: nn.Module, plan: Plan, paths: tuple[str, ...], shards: Shards, device: torch.device):
        self.model, self.plan, self.paths, self.shards, self.device = model, plan, paths, shards, device
        self._parts = [plan_of_part(plan, path) for path in paths]
        for path in paths:  # what is missing is said before anything is trained
            missing = [n for n, t in model.get_submodule(path).named_parameters() if t.is_meta]
            shards.check([f"{path}.{name}" for name in missing])
        fill(model, shards, "", device, without=paths)
        prepare(model, plan_around(plan, paths))
        setattr(model, STATE_NAME, PreparedState(plan))
        model.register_buffer(STEP_NAME, torch.zeros(1, dtype=torch.int64, device=device))

    def open(self, index: int) -> nn.Module:
        path = self.paths[index]
        fill(self.model, self.shards, path, self.device)
        return prepare_part(self.model.get_submodule(path), self._parts[index]).eval()

    def close(self, index: int, block: nn.Module, files: BlockFiles) -> None:
        self._code(index, block)
        files.write_block(index, dict(block.state_dict()))
        empty(block)

    def put_back(self) -> None:
        """Nothing to do: a block that was read has no place to go back to."""

    def restore(self, index: int, files: BlockFiles) -> None:
        block = self.model.get_submodule(self.paths[index])
        self._code(index, prepare_part(block, self._parts[index], has_values=False))
        empty(block)

    def finish(self, files: BlockFiles) -> None:
        for index, path in enumerate(self.paths):
            place(self.model.get_submodule(path), files.read_block(index), self.device, files.block_file(index))

    def on_device(self, call: Call) -> Call:
        return moved(call, self.device)

    def _code(self, index: int, block: nn.Module) -> None:
        layers = {layer.path: block.get_submodule(layer.path) for layer in self._parts[index].layers}
        code_layers(block, [path for path, layer in layers.items() if why_not_coded(layer) is None])
