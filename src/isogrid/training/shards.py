"""Float weights in sharded safetensors files, read a module at a time."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from isogrid.errors import CheckpointError
from isogrid.quantizers import Quantizer
from isogrid.training.tensor_files import TensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Shards:
    """The tensors of a folder as transformers writes it: `model.safetensors`, or shards with an index of names.

    Args:
        folder: with the files; or the path of one safetensors file.

    Raises:
        CheckpointError: there is no such folder, no index, or a shard that the index names is missing or truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files = self._located()
        for path, names in _grouped(self._files).items():  # what is truncated is found before anything is trained
            missing = set(names) - set(TensorFile(path).names)
            if missing:
                raise CheckpointError(f"{path} has no {min(missing)}, although the index says so. Fetch it again.")

    def _located(self) -> dict[str, Path]:
        """The file of each tensor."""
        single = self.folder if self.folder.is_file() else self.folder / SINGLE
        index = self.folder / INDEX
        if index.is_file():
            try:
                names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {name: self.folder / file for name, file in names.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} is corrupt: {type(error).__name__}: {error}.") from error
        if not single.is_file():
            raise CheckpointError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}. Give a folder of safetensors files, as "
                "save_pretrained writes it."
            )
        return dict.fromkeys(TensorFile(single).names, single)

    def check(self, names: Iterable[str]) -> None:
        """Raise CheckpointError where one of these tensors is not there."""
        for name in names:
            if name not in self._files:
                raise CheckpointError(
                    f"{self.folder} has no tensor {name!r}. It is of another model, or its names are: write it with "
                    "this model's save_pretrained."
                )

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own; raises CheckpointError where it is not there."""
        self.check([name])
        return TensorFile(self._files[name]).read(name)

    def __contains__(self, name: str) -> bool:
        return name in self._files


def fill(model: nn.Module, shards: Shards, path: str, device: torch.device, *, without: tuple[str, ...] = ()) -> None:
    """Give the parameters of a module that are on the meta device their values, in their own dtypes.

    Args:
        model: the whole one, whose names the shards have; a parameter that is tied may be there under any of its names.
        shards: with the values.
        path: of the module.
        device: where the values go.
        without: paths of modules inside that stay as they are.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), []).append(name)
    inside = [
        (name, tensor)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_meta and f"{name}.".startswith(f"{path}." if path else "")
        and not any(name.startswith(f"{left}.") for left in without)
    ]  # fmt: skip
    sources = {name: next((n for n in names[id(tensor)] if n in shards), name) for name, tensor in inside}
    for name, tensor in inside:
        value = shards.read(sources[name])
        if value.shape != tensor.shape:
            raise CheckpointError(
                f"{shards.folder} is of another model: its {name} has shape {list(value.shape)}, "
                f"not {list(tensor.shape)}."
            )
        value = value.to(device, tensor.dtype)
        new = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        for alias in names[id(tensor)]:
            _put(model, alias, new)


@torch.no_grad()
def empty(module: nn.Module) -> None:
    """Let go of a module's parameters and of the buffers that a state_dict has; places on the meta device remain."""
    kept = module.state_dict(keep_vars=True).keys()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in kept:
            meta = torch.empty_like(tensor, device="meta")
            _put(module, name, nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta)


def place(module: nn.Module, tensors: dict[str, Tensor], device: torch.device, source: Path) -> None:
    """Put tensors in the places that `empty` has left; raises CheckpointError where they do not fit."""
    state = module.state_dict(keep_vars=True)
    if state.keys() != tensors.keys() or any(state[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise CheckpointError(f"{source} does not fit this model. Use another folder, or the model it was written for.")
    for name, tensor in tensors.items():
        value, old = tensor.to(device), state[name]
        _put(module, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)
    for quantizer in module.modules():
        if isinstance(quantizer, Quantizer):
            quantizer.take_over()


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(value, nn.Parameter):
        owner._parameters[last] = value
    else:
        owner._buffers[last] = value


def _grouped(files: dict[str, Path]) -> dict[Path, list[str]]:
    """The names in each file."""
    found: dict[Path, list[str]] = {}
    for name, path in files.items():
        found.setdefault(path, []).append(name)
    return found
