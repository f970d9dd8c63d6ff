"""GGUF files: writing them whole, from nothing or in the place of a base that llama.cpp's converter made."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from torch import Tensor

from isogrid.errors import TargetError
from isogrid.formats import Quantized
from isogrid.formats.ggml import ggml_name
from isogrid.targets.gguf_architectures import Metadata
from isogrid.targets.gguf_tensors import Placed

FILE_TYPES = {
    kind: number
    for kind in GgmlType
    for number in gguf.LlamaFileType
    if number.name in (f"ALL_{kind.name}", f"MOSTLY_{kind.name}", f"MOSTLY_{kind.name}_M", f"MOSTLY_{kind.name}_MOE")
}
"""What `general.file_type` calls a file by the type of most of its numbers."""

QUANTIZATION_VERSION = 2
"""Of ggml's blocks; `GGML_QNT_VERSION` in ggml.h."""


class Contents:
    """What is written: metadata and tensors, in order."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.metadata: Metadata = {}
        self.typed: list[tuple[str, Any, gguf.GGUFValueType, gguf.GGUFValueType | None]] = []
        self.tensors: dict[str, tuple[np.ndarray[Any, Any], GgmlType]] = {}

    def place(self, tensors: Iterable[Placed]) -> None:
        """Add tensors of a model, and the scales that their blocks do not hold.

        Raises:
            TargetError: llama.cpp does not read such a scale there.
        """
        for tensor in tensors:
            self.tensors[tensor.name] = tensor.data()
            scale = scale_of_tensor(tensor.value)
            if scale is None:
                continue
            if not tensor.name.startswith("token_embd."):
                values = scale.expand(max(1, tensor.order.experts)).numpy().astype(np.float32)
                self.tensors[tensor.name.removesuffix(".weight") + ".scale"] = values, GgmlType.F32
            elif float(scale) != 1.0:
                raise TargetError(
                    f"{tensor.name}: llama.cpp reads no scale of a whole tensor for embeddings, and NVFP4 has one. "
                    "Give embeddings another format by a rule, q8_0 say."
                )

    def write(self, path: Path) -> None:
        """Fill the file at a path."""
        writer = gguf.GGUFWriter(path, self.architecture)
        kinds = Counter[GgmlType]()
        for data, kind in self.tensors.values():
            kinds[kind] += data.nbytes
        most = kinds.most_common(1)[0][0]
        facts = {"general.quantization_version": QUANTIZATION_VERSION, **self.metadata}
        if most in FILE_TYPES:
            facts["general.file_type"] = int(FILE_TYPES[most])
        for key, value in facts.items():
            _add(writer, key, value)
        for key, value, kind_of, part in self.typed:
            if key not in facts:
                writer.add_key_value(key, value, kind_of, part)
        for name, (data, kind) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def scale_of_tensor(value: Quantized | Tensor) -> Tensor | None:
    """The scale float32 [1] of a whole tensor that no block holds, as NVFP4 has it; None for other formats."""
    if isinstance(value, Tensor) or ggml_name(value.format) != "nvfp4":
        return None
    assert value.scale is not None and value.scale.scale is not None
    return value.scale.scale.dequantize().reshape(1).cpu()


def float_tensors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[np.ndarray[Any, Any], GgmlType]]:
    """float32 tensors as `Contents` has them."""
    return {name: (tensor.to(torch.float32).numpy(), GgmlType.F32) for name, tensor in tensors.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A value under the type that llama.cpp expects: numbers of 32 bits."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
