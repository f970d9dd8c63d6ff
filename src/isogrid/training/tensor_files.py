"""Safetensors files read a tensor at a time, into memory of its own.

The library's reader maps a whole file and counts as its size for as long as one tensor of it lives, which is not for
models that are larger than memory. The layout: 8 bytes with the length of the header, the header in JSON with dtype,
shape and offsets of every tensor, and their bytes.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Of torch, by their names in a header."""


class TensorFile:
    """A safetensors file; only its header is read at first.

    Args:
        path: of the file.

    Attributes:
        names: of its tensors.
        metadata: text by name.

    Raises:
        CheckpointError: it is missing, or its length is not what its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError("its header is cut off")
                header: dict[str, Any] = json.loads(file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._start, self._entries = 8 + length, header
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if path.stat().st_size != self._start + end:
                raise ValueError(f"it has {path.stat().st_size} bytes, not {self._start + end}")
            if unknown := {entry["dtype"] for entry in header.values()} - DTYPES.keys():
                raise ValueError(f"it holds tensors of {', '.join(sorted(unknown))}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is missing, corrupt or truncated: {error}.") from error
        self.names = tuple(header)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        memory: Any = data.numpy()
        with self.path.open("rb") as file:
            file.seek(self._start + begin)
            read = file.readinto(memory) if end > begin else 0
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if read != end - begin or prod(shape) * dtype.itemsize != read:
            raise CheckpointError(f"{self.path} is corrupt or truncated at the tensor {name!r}.")
        return data.view(dtype).reshape(shape)

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {name: self.read(name) for name in self.names}
