"""Weights as torchao's tensors: codes and scales of a converted model, in modules of torch."""

import torch
from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from isogrid.errors import TargetError
from isogrid.layers.integer import IntegerModule, PackedLinear
from isogrid.layers.nbits import quantizes_input, unpack_matmul_nbits


def with_torchao_weights(integer_model: nn.Module) -> nn.Module:
    """Replace every packed Linear of a converted model, in place, by a torch.nn.Linear with a torchao weight.

    Embeddings, whose tables torchao does not index with their options, stay as they are.

    Args:
        integer_model: of `isogrid.convert`.

    Raises:
        TargetError: layers compute with integer activations, or nothing is packed.
    """
    packed = {path: module for path, module in integer_model.named_modules() if isinstance(module, PackedLinear)}
    for path, module in integer_model.named_modules():
        integers = isinstance(module, PackedLinear) and quantizes_input(
            module.bits, module.block, module.accuracy_level
        )
        if integers or isinstance(module, IntegerModule):
            raise TargetError(
                f"{path!r} was trained on integer activations, and torchao rounds activations by a rule of its own. "
                "Plan with a weight-only scheme, such as w4a16 or w8a16."
            )
    if not packed:
        raise TargetError("No Linear of this model has a packed weight. Plan with a weight-only scheme, such as w4a16.")
    made = {module: _linear(module) for module in packed.values()}
    for parent in list(integer_model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, PackedLinear):
                parent._modules[name] = made[child]
    return integer_model.eval()


def _linear(layer: PackedLinear) -> nn.Linear:
    codes = unpack_matmul_nbits(layer.codes, layer.bits)
    weight = IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=layer.weight_scale,
        zero_point=torch.zeros_like(layer.weight_scale, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{layer.bits}"),
        block_size=(1, layer.block),
        dtype=torch.float32,
        activation_quantization=None,
    )
    new = nn.Linear(codes.shape[1], codes.shape[0], bias=False, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    bias = layer.get_buffer("bias") if layer._buffers["bias"] is not None else None
    new.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return new
