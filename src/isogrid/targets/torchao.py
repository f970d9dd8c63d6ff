"""Weights as torchao's tensors: codes and scales of a converted model, in modules of torch."""

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from isogrid.errors import TargetError
from isogrid.formats import IntegerGrid
from isogrid.layers.experts import StoredExperts
from isogrid.layers.integer import IntegerModule, PackedLinear
from isogrid.layers.nbits import quantizes_input, unpack_matmul_nbits
from isogrid.layers.stored import StoredLinear

Packed = PackedLinear | StoredLinear


def with_torchao_weights(integer_model: nn.Module) -> nn.Module:
    """Replace every packed Linear of a converted model, in place, by a torch.nn.Linear with a torchao weight.

    Embeddings, whose tables torchao does not index with their options, stay as they are.

    Args:
        integer_model: of `isogrid.convert`.

    Raises:
        TargetError: layers compute with integer activations, or nothing is packed.
    """
    packed = {path: module for path, module in integer_model.named_modules() if isinstance(module, Packed)}
    for path, module in integer_model.named_modules():
        if _multiplies_integers(module):
            raise TargetError(
                f"{path!r} was trained on integer activations, and torchao rounds activations by a rule of its own. "
                "Plan with a weight-only scheme, such as w4a16 or w8a16."
            )
    if not packed:
        raise TargetError("No Linear of this model has a packed weight. Plan with a weight-only scheme, such as w4a16.")
    dtype = next((p.dtype for p in integer_model.parameters() if p.is_floating_point()), torch.float32)
    made = {module: _linear(path, module, dtype) for path, module in packed.items()}
    for parent in list(integer_model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, Packed):
                parent._modules[name] = made[child]
    return integer_model.eval()


def _multiplies_integers(module: nn.Module) -> bool:
    if isinstance(module, PackedLinear):
        return quantizes_input(module.bits, module.block, module.accuracy_level)
    if isinstance(module, StoredLinear):
        return module.activations != "float"
    return isinstance(module, IntegerModule)


def _linear(path: str, layer: Packed, dtype: torch.dtype) -> nn.Linear:
    if isinstance(layer, PackedLinear):
        codes, scale = unpack_matmul_nbits(layer.codes, layer.bits), layer.weight_scale
        bits, block = layer.bits, layer.block
        zero_point, dtype = torch.zeros_like(scale, dtype=torch.int8), torch.float32
    else:
        codes, scale, zero_point, bits = _integers(path, layer)
        block = codes.shape[1] // scale.shape[1]
    weight = IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=scale.to(dtype),
        zero_point=zero_point,
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=(1, block),
        dtype=dtype,
        activation_quantization=None,
    )
    new = nn.Linear(codes.shape[1], codes.shape[0], bias=False, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    bias = layer.get_buffer("bias") if layer._buffers["bias"] is not None else None
    new.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))
    return new


def _integers(path: str, layer: StoredLinear) -> tuple[Tensor, Tensor, Tensor, int]:
    """Signed codes, scales, zero points and bits of a weight that is stored by group or by channel."""
    quantized = layer.quantized
    grid, (scale, zero_point, offset) = quantized.format.grid, quantized.affine
    whole = isinstance(grid, IntegerGrid) and grid.bits <= 8 and offset is None
    if not whole or scale is None or len(scale) != len(quantized.codes) or isinstance(layer, StoredExperts):
        raise TargetError(
            f"{path!r} is stored as {quantized.format}, which torchao has no tensor for. Use integers by group or "
            "by channel, such as int4/group32, for linear layers, and keep others in float by a rule."
        )
    bits = int(grid.bits)
    shift = 0 if grid.lowest < 0 else 1 << bits - 1  # unsigned codes and their zero points, moved down alike
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point - shift
    return (quantized.codes.to(torch.int16) - shift).to(torch.int8), scale, zeros.to(torch.int8), bits
