"""The kernels that runtimes do not agree on, by the name of the runtime.

Products that are accumulated, linear layers and convolutions, are the same everywhere: `isogrid.layers.arithmetic` has
them. Sites, their integer twins and the operators `torch.ops.isogrid.*` carry the name of a set of kernels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from isogrid.layers import (
    arithmetic,
    ggml_functions,
    litert_kernels,
    onnxruntime_kernels,
    torch_kernels,
    xnnpack_kernels,
)
from isogrid.layers.activations import lookup_table

Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Kernels:
    """How one runtime computes on codes.

    Codes in, codes out: every tensor of codes is followed by its scale and its zero point, then come the output's scale
    and zero point, what the operation itself needs, and the lowest and highest code of the output. The zero points
    have the dtype of the codes.

    Attributes:
        quantize: codes of a float tensor, with scale, zero point, lowest and highest code.
        add, multiply: of two tensors of codes that broadcast; where one is repeated along the innermost dimension,
            it is the second.
        average_pool: over windows, [batch, channels, *space], with kernel, stride, padding, ceil_mode and
            count_include_pad as in torch.
        global_average_pool: over all of space, [batch, channels, *space] to [batch, channels, 1, ...].
        table: of the codes of an elementwise function; see `activations.lookup_table`, which holds wherever the table
            itself is deployed.
        code_bound: share of the codes of one operation that the runtime may round to the neighbour, where scales are
            not powers of two; by powers of two everybody rounds alike.
        packs_nbits: whether linear layers in float arithmetic are MatMulNBits; elsewhere `isogrid.convert` keeps
            weights as their formats store them.
        functions: of float tensors, by torch's names, that the runtime computes otherwise than torch by more than the
            order of sums. They train as the runtime has them.
    """

    quantize: Kernel
    add: Kernel
    multiply: Kernel
    average_pool: Kernel
    global_average_pool: Kernel
    table: Kernel = lookup_table
    code_bound: float = 0.0
    packs_nbits: bool = False
    functions: Mapping[str, Kernel] = field(default_factory=dict)


def float_add(*operands: Any) -> Tensor:
    """Addition of what codes stand for in float32, and QuantizeLinear: as a Q/DQ graph says, node by node."""
    a, b = (arithmetic.dequantize(*operands[start : start + 3]) for start in (0, 3))
    return arithmetic.quantize(a + b, *operands[6:])


_ONNX_RUNTIME = Kernels(
    quantize=arithmetic.quantize,
    add=onnxruntime_kernels.add,
    multiply=onnxruntime_kernels.multiply,
    average_pool=onnxruntime_kernels.average_pool,
    global_average_pool=onnxruntime_kernels.global_average_pool,
    packs_nbits=True,
)

_XNNPACK = Kernels(
    quantize=xnnpack_kernels.quantize,
    add=xnnpack_kernels.add,
    multiply=xnnpack_kernels.multiply,
    average_pool=xnnpack_kernels.average_pool,
    global_average_pool=xnnpack_kernels.global_average_pool,
)

_FLOAT = replace(_ONNX_RUNTIME, packs_nbits=False)

KERNELS: dict[str, Kernels] = {
    "onnxruntime": _ONNX_RUNTIME,
    # OpenVINO multiplies by reciprocals, adds zero points before it rounds, and the bias after it scales.
    "openvino": replace(_ONNX_RUNTIME, code_bound=1e-3),
    # TensorRT's files say what float operators between Q/DQ compute.
    "tensorrt": replace(_ONNX_RUNTIME, add=float_add, code_bound=1e-3),
    # QONNX adds up dequantised values in float32.
    "qonnx": replace(_ONNX_RUNTIME, code_bound=1e-3),
    "xnnpack": _XNNPACK,
    "litert": replace(_XNNPACK, average_pool=litert_kernels.average_pool, table=litert_kernels.table),
    "torch": Kernels(
        quantize=xnnpack_kernels.quantize,
        add=torch_kernels.add,
        multiply=torch_kernels.multiply,
        average_pool=torch_kernels.average_pool,
        global_average_pool=torch_kernels.global_average_pool,
        # Products accumulated in float32 and scaled twice; about 1e-5 of the codes of a layer.
        code_bound=1e-4,
    ),
    # Runtimes that compute in float on stored weights: they have no static integers, so that none of the kernels is
    # called.
    "float": _FLOAT,
    "ggml": replace(_FLOAT, functions={"gelu": ggml_functions.gelu}),
}
"""The kernels by the name that a plan carries."""
