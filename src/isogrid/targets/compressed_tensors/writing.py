"""What of a converted model goes into a compressed-tensors checkpoint."""

from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import TargetError
from isogrid.formats import Quantized
from isogrid.layers.experts import StoredExperts
from isogrid.layers.stored import StoredLinear
from isogrid.targets.checkpoints.rows import Rows, take_rows
from isogrid.targets.checkpoints.writing import Layers, float_linears
from isogrid.targets.compressed_tensors.config import Storage, quantization_config
from isogrid.targets.compressed_tensors.packing import LAYOUTS, PACKED
from isogrid.targets.compressed_tensors.states import attention_group, cache_arguments


def packed_tensors(module: StoredLinear, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of some rows of a layer, by their names within it, for a model of this dtype."""
    tensors = stored_tensors(take_rows(module.quantized, rows), module.activations, dtype)
    if module.input is not None and module.input.format.grid.dimension > 1:
        tensors["input_global_scale"] = 1 / module.input.scale.reshape(1)  # a divisor, of a power of two
    elif module.input is not None:
        tensors["input_scale"] = module.input.scale.reshape(1)
    return tensors


def stored_tensors(quantized: Quantized, activations: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight by their names within its layer, for inputs of a rule or format and a model of a dtype.

    Raises:
        TargetError: the dtype cannot hold the scales.
    """
    layout = LAYOUTS[Storage(quantized.format, activations).layout]
    tensors = layout.pack(quantized)
    if layout is PACKED:
        # Readers decompress in the dtype that the scale has in the file, so it is the model's, in which it is exact.
        scale = tensors["weight_scale"].to(dtype)
        if not torch.equal(scale.float(), tensors["weight_scale"].float()):
            raise TargetError(
                f"Scales of {quantized.format} cannot be stored in {dtype}, the dtype of the model. "
                "Take scales of that dtype, by a format such as int4/group128:scale=float16."
            )
        tensors["weight_scale"] = scale
    return tensors


def storage_of(module: StoredLinear) -> Storage:
    """How a layer is stored."""
    return Storage(module.format, module.activations)


def configured(model: nn.Module, stored: Layers, rows: Rows) -> Any:
    """`quantization_config` of a converted model."""
    disk: dict[str, list[str]] = {}
    for name, (source, _) in rows.items():
        disk.setdefault(source, []).append(name)
    layers: dict[str, Storage] = {}
    experts: dict[str, Storage] = {}
    for path, module in stored.items():
        if isinstance(module, StoredExperts):
            experts[path] = storage_of(module)
        else:
            for name in dict.fromkeys((path, *disk[f"{path}.weight"])):
                layers[name] = storage_of(module)
    return quantization_config(layers, experts, float_linears(model), cache_arguments(model), attention_group(model))
