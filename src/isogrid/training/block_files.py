"""What block-wise training keeps on disk: hidden states between two blocks, trained blocks, and its position."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from isogrid.errors import CheckpointError
from isogrid.files import write_json, write_whole
from isogrid.training.checkpoint import load_state
from isogrid.training.optimizer_state import load_optimizer, optimizer_parts
from isogrid.training.tensor_files import TensorFile

MANIFEST = "blockwise.json"
FORMAT = 1


class BlockFiles:
    """The folder of a run of block-wise training. Every file is written whole or not at all.

    Attributes:
        folder: with `blockwise.json`, which says how many blocks are done; `block-<i>.safetensors`, the trained ones;
            `step.safetensors`, the block that is being trained; `hidden/`, the inputs of the blocks.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.step_file = folder / "step.safetensors"

    def read(self) -> dict[str, Any] | None:
        """The manifest; None where there is none yet."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version, _ = int(manifest["format"]), int(manifest["done"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is corrupt: {type(error).__name__}: {error}.") from error
        if version > FORMAT:
            raise CheckpointError(f"{path} has format {version}; this version of Isogrid reads up to {FORMAT}.")
        return manifest

    def write(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest: what it says is done from here on."""
        write_json(self.folder / MANIFEST, {"format": FORMAT, **manifest})

    def forget(self) -> None:
        """Begin anew: the manifest goes first, so that the rest is never taken for a run."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        self.step_file.unlink(missing_ok=True)
        for path in [*self.folder.glob("block-*.safetensors"), *self.folder.glob("hidden/*.safetensors")]:
            path.unlink()

    def block_file(self, index: int) -> Path:
        """Where a trained block is."""
        return self.folder / f"block-{index:04}.safetensors"

    def write_block(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Keep a trained block."""
        _write(self.block_file(index), tensors)

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of a trained block; raises CheckpointError where they cannot be read."""
        return TensorFile(self.block_file(index)).read_all()

    def hidden_file(self, index: int, kind: str, number: int) -> Path:
        return self.folder / "hidden" / f"{index:04}-{kind}-{number:06}.safetensors"

    def write_hidden(self, index: int, kind: str, number: int, hidden: Tensor) -> None:
        """Keep what a block gets for a batch: `kind` is `float` or `quantized`."""
        _write(self.hidden_file(index, kind, number), {"hidden": hidden})

    def read_hidden(self, index: int, kind: str, number: int) -> Tensor:
        """What a block gets for a batch."""
        return TensorFile(self.hidden_file(index, kind, number)).read("hidden")

    def forget_hidden(self, index: int) -> None:
        """Drop what a block got."""
        for path in (self.folder / "hidden").glob(f"{index:04}-*.safetensors"):
            path.unlink()

    def write_step(
        self, index: int, step: int, block: nn.Module, optimizer: Optimizer, losses: Iterable[float]
    ) -> None:
        """Keep where the training of a block is."""
        tensors, plain = optimizer_parts(optimizer)
        files = {f"block/{name}": tensor for name, tensor in block.state_dict().items()}
        files |= {f"optimizer/{name}": tensor for name, tensor in tensors.items()}
        position = {"block": index, "step": step, "losses": list(losses), "optimizer": plain}
        _write(self.step_file, files, {"position": json.dumps(position)})

    def read_step(self, index: int, block: nn.Module, optimizer: Optimizer) -> tuple[int, list[float]] | None:
        """Load where the training of a block was: steps done, and their losses; None where it has not begun."""
        if not self.step_file.is_file():
            return None
        file = TensorFile(self.step_file)
        try:
            position = json.loads(file.metadata["position"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.step_file} is corrupt: {error}.") from error
        if position["block"] != index:
            return None  # of the block before, and not yet overwritten
        # One after the other, for together they are three blocks.
        load_state(block, _under("block/", file), self.step_file)
        load_optimizer(optimizer, _under("optimizer/", file), position["optimizer"], self.step_file)
        return int(position["step"]), list(position["losses"])


def _under(prefix: str, file: TensorFile) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): file.read(name) for name in file.names if name.startswith(prefix)}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """One file of tensors; those that are a part of something larger are copied."""

    def alone(tensor: Tensor) -> Tensor:
        found = tensor.detach().cpu().contiguous()
        return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()

    apart = {name: alone(tensor) for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(apart, temporary, metadata))


