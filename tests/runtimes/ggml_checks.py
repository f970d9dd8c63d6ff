"""What is asked of ggml and libllama themselves, through their C interfaces, where they live."""

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

import torch
from llama_cpp import _ggml, llama_cpp

Tensors = dict[str, torch.Tensor]

GGML, LLAMA = _ggml.libggml, llama_cpp._lib
FLOAT32 = 0


class Memory(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


class Traits(ctypes.Structure):
    """The head of ggml_type_traits_cpu."""

    _fields_ = (("from_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),)


class Description(ctypes.Structure):
    """llama_quant_model_desc."""

    _fields_ = (
        ("architecture", c_char_p),
        *[(name, c_uint32) for name in ("embedding", "feed_forward", "layers", "heads", "kv_heads", "experts")],
        *[(name, c_uint32) for name in ("key", "value")],
    )


class Parameters(ctypes.Structure):
    """llama_model_quantize_params, or more."""

    _fields_ = (("bytes", ctypes.c_char * 1024),)


def _function(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


_init = _function(GGML, "ggml_init", c_void_p, Memory)
_free = _function(GGML, "ggml_free", None, c_void_p)
_tensor = _function(GGML, "ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
_set_name = _function(GGML, "ggml_set_name", c_void_p, c_void_p, c_char_p)
_data = _function(GGML, "ggml_get_data", c_void_p, c_void_p)
_product = _function(GGML, "ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
_gelu = _function(GGML, "ggml_gelu", c_void_p, c_void_p, c_void_p)
_graph = _function(GGML, "ggml_new_graph", c_void_p, c_void_p)
_expand = _function(GGML, "ggml_build_forward_expand", None, c_void_p, c_void_p)
_compute = _function(GGML, "ggml_graph_compute_with_ctx", c_int, c_void_p, c_void_p, c_int)
_traits = _function(GGML, "ggml_get_type_traits_cpu", ctypes.POINTER(Traits), c_int)
_row_size = _function(GGML, "ggml_row_size", c_size_t, c_int, c_int64)
_type_name = _function(GGML, "ggml_type_name", c_char_p, c_int)
_quantize = _function(
    GGML, "ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p
)
_description = _function(
    LLAMA, "_Z31llama_quant_model_from_metadataPK22llama_quant_model_desc", c_void_p, ctypes.POINTER(Description)
)
_start = _function(
    LLAMA, "_Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params", c_void_p, c_void_p, c_void_p
)
_types = _function(
    LLAMA,
    "_Z25llama_quant_compute_typesP19quantize_state_impl11llama_ftypePP11ggml_tensorP9ggml_typem",
    None,
    *(c_void_p, c_int, c_void_p, c_void_p, c_size_t),
)
_defaults = _function(LLAMA, "llama_model_quantize_default_params", Parameters)
_function(GGML, "ggml_cpu_init", None)()


def activations(tensors: Tensors, kind: int, size: int) -> tuple[None, Tensors]:
    """The bytes of rows x [rows, K] in a type, as a product stores its input; `size` bytes a row."""
    x = tensors["x"].contiguous()
    stored = torch.zeros(len(x), size, dtype=torch.uint8)
    for row, out in zip(x, stored, strict=True):
        _traits(kind).contents.from_float(row.data_ptr(), out.data_ptr(), x.shape[1])
    return None, {"stored": stored}


def product(tensors: Tensors, kind: int) -> tuple[None, Tensors]:
    """x [m, K] by a packed weight uint8 [n, bytes of a row], float32 [m, n]."""
    x, weight = tensors["x"].contiguous(), tensors["weight"].contiguous()
    context = _init(Memory(64 << 20, None, False))
    left, right = _tensor(context, kind, x.shape[1], len(weight)), _tensor(context, FLOAT32, x.shape[1], len(x))
    ctypes.memmove(_data(left), weight.data_ptr(), weight.numel())
    ctypes.memmove(_data(right), x.data_ptr(), 4 * x.numel())
    result, graph = _product(context, left, right), _graph(context)
    _expand(graph, result)
    assert _compute(context, graph, 1) == 0
    y = torch.empty(len(x), len(weight))
    ctypes.memmove(y.data_ptr(), _data(result), 4 * y.numel())
    _free(context)
    return None, {"y": y}


def gelu(tensors: Tensors) -> tuple[None, Tensors]:
    """GELU of x [rows, n]."""
    x = tensors["x"].contiguous()
    context = _init(Memory(16 << 20, None, False))
    values = _tensor(context, FLOAT32, x.shape[1], len(x))
    ctypes.memmove(_data(values), x.data_ptr(), 4 * x.numel())
    result, graph = _gelu(context, values), _graph(context)
    _expand(graph, result)
    assert _compute(context, graph, 1) == 0
    y = torch.empty_like(x)
    ctypes.memmove(y.data_ptr(), _data(result), 4 * y.numel())
    _free(context)
    return None, {"y": y}


def quantized(tensors: Tensors, kind: int) -> tuple[None, Tensors]:
    """The bytes of x [n, K] as ggml's own quantiser stores them."""
    x = tensors["x"].contiguous()
    packed = torch.zeros(len(x), _row_size(kind, x.shape[1]), dtype=torch.uint8)
    _quantize(kind, x.data_ptr(), packed.data_ptr(), 0, *x.shape, None)
    return None, {"packed": packed}


def types(
    tensors: Tensors, names: list[str], shapes: list[list[int]], file_types: dict[str, int], layers: int, sharing: int,
    experts: int = 0,
) -> tuple[dict[str, list[str]], Tensors]:
    """The types that llama-quantize gives to tensors of these names, by the name of the file's type."""
    model = _description(ctypes.byref(Description(b"llama", 256, 512, layers, 8, 8 // sharing, experts, 32, 32)))
    parameters = _defaults()
    state = _start(model, ctypes.addressof(parameters))
    context = _init(Memory(16 << 20, None, True))
    made = (c_void_p * len(names))(*[_tensor(context, FLOAT32, shape[1], shape[0]) for shape in shapes])
    for tensor, name in zip(made, names, strict=True):
        _set_name(tensor, name.encode())
    found, result = {}, (c_int * len(names))()
    for file_type, number in file_types.items():
        _types(state, number, made, result, len(names))
        found[file_type] = [_type_name(kind).decode().lower() for kind in result]
    _free(context)
    return found, {}
