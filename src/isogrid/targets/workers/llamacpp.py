"""llama.cpp, in the process and environment that has it, through llama-cpp-python's bindings."""

import ctypes
import time
from typing import Any

import numpy as np
import torch
from llama_cpp import _ggml, llama_cpp

PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
"""ggml's numbers of the types that a key-value cache may have."""

_library = _ggml.libggml
_library.ggml_op_desc.restype = ctypes.c_char_p
_library.ggml_op_desc.argtypes = [ctypes.c_void_p]
_library.ggml_type_name.restype = ctypes.c_char_p
_library.ggml_type_name.argtypes = [ctypes.c_int]


class _Tensor(ctypes.Structure):
    """ggml_tensor of ggml.h."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.POINTER(_Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class _Watch:
    """The evaluation callback: remembers every product of the graph.

    Where asked also the data of products by weights, and of flash attention and what was written for it into the cache.
    """

    def __init__(self, copies: bool) -> None:
        self.copies = copies
        self.products: list[dict[str, Any]] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.written: dict[int, torch.Tensor] = {}
        self.attentions = 0
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._called)

    def _called(self, address: int, asking: bool, _: Any) -> bool:
        kind = _library.ggml_op_desc(address).decode()
        if kind not in PRODUCTS and not (self.copies and kind in ("SET_ROWS", "FLASH_ATTN_EXT")):
            return not asking  # False to the question: no interest; True to the answer: go on
        if not asking:
            node = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
            if kind in PRODUCTS:
                self._computed(node, address)
            elif kind == "SET_ROWS":
                self.written[_place(node)] = _copy(node.src[0].contents)
            else:
                self._attended(node)
        return True

    def _attended(self, result: _Tensor) -> None:
        query, key, value = (result.src[place].contents for place in range(3))
        length = query.ne[1]
        scale = torch.tensor(list(result.op_params)[:1], dtype=torch.int32).view(torch.float32)
        found = {"query": _copy(query), "output": _copy(result), "scale": scale}
        for name, part in (("key", key), ("value", value)):
            found |= {name: _bytes(part)[:, :length], f"written_{name}": self.written[_place(part)]}
        self.tensors |= {f"attention{self.attentions}.{name}": tensor[None] for name, tensor in found.items()}
        self.attentions += 1

    def _computed(self, result: _Tensor, address: int) -> None:
        weight, values = result.src[0].contents, result.src[1].contents
        number, name = len(self.products), weight.name.decode()
        by_weight = not weight.op and name.endswith(".weight")
        self.products.append(
            {
                "weight": name if by_weight else "",
                "operator": _library.ggml_op_desc(address).decode(),
                "type": _library.ggml_type_name(weight.type).decode(),
            }
        )
        if by_weight and self.copies:
            self.tensors[f"{number}.input"], self.tensors[f"{number}.output"] = _copy(values), _copy(result)
            if result.src[2]:
                self.tensors[f"{number}.experts"] = _copy(result.src[2].contents, ctypes.c_int32)


def _place(tensor: _Tensor) -> int:
    """The address of the tensor that this one is a view of."""
    return ctypes.cast(tensor.view_src, ctypes.c_void_p).value or 0


def _bytes(tensor: _Tensor) -> torch.Tensor:
    """The rows of a tensor of any type, uint8 [..., rows, bytes]."""
    _library.ggml_row_size.restype = ctypes.c_size_t
    size = _library.ggml_row_size(ctypes.c_int(tensor.type), ctypes.c_int64(tensor.ne[0]))
    shape, strides = (*tuple(tensor.ne)[:0:-1], size), (*tuple(tensor.nb)[:0:-1], 1)
    length = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) + 1
    flat = np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_uint8)), (length,))
    return torch.from_numpy(np.lib.stride_tricks.as_strided(flat, shape, strides).copy()).flatten(0, -3)


def _copy(tensor: _Tensor, element: Any = ctypes.c_float) -> torch.Tensor:
    """A tensor of 4-byte elements, its dimensions in torch's order, without the leading ones."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    size = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) // 4 + 1
    flat = np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(element)), (size,))
    copied = torch.from_numpy(np.lib.stride_tricks.as_strided(flat, shape, strides).copy())
    while copied.dim() > 2 and copied.shape[0] == 1:
        copied = copied[0]
    return copied


class _Loaded:
    """One model, with a context for as many tokens as were last asked for."""

    model: Any = None
    threads = 0
    options: dict[str, str]


def load(
    tensors: dict[str, torch.Tensor], path: str, threads: int, options: dict[str, str]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Load a GGUF file, in place of the one before.

    Args:
        tensors: none.
        path: of the file.
        threads: 0 for as many as torch takes: more threads than free cores wait for one another.
        options: of contexts: `type_k` and `type_v`, which are among `TYPES`, and `flash_attn`, on or off.

    Returns:
        The length of its context, the size of its vocabulary, and the version of llama-cpp-python.
    """
    import llama_cpp as package

    if _Loaded.model is not None:
        llama_cpp.llama_model_free(_Loaded.model)
        _Loaded.model = None
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        raise ValueError(f"llama.cpp cannot load {path}")
    _Loaded.model, _Loaded.threads, _Loaded.options = model, threads or torch.get_num_threads(), options
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    facts = {"context": llama_cpp.llama_model_n_ctx_train(model), "vocabulary": vocabulary}
    return {**facts, "version": package.__version__}, {}


def _context(tokens: int, watch: _Watch | None = None, exact: bool = True) -> Any:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = tokens
    parameters.n_seq_max = 1
    if exact:
        parameters.type_k, parameters.type_v = (TYPES[_Loaded.options[name]] for name in ("type_k", "type_v"))
        parameters.flash_attn_type = int(_Loaded.options["flash_attn"] == "on")
        parameters.swa_full = True
    parameters.n_threads = parameters.n_threads_batch = _Loaded.threads
    if watch is not None:
        parameters.cb_eval = watch.callback
    context = llama_cpp.llama_init_from_model(_Loaded.model, parameters)
    if not context:
        raise ValueError(f"llama.cpp makes no context of {tokens} tokens")
    return context


def _decode(context: Any, row: list[int], start: int, all_logits: bool) -> None:
    batch = llama_cpp.llama_batch_init(len(row), 0, 1)
    try:
        batch.n_tokens = len(row)
        for number, token in enumerate(row):
            batch.token[number], batch.pos[number] = token, start + number
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
            batch.logits[number] = all_logits or number == len(row) - 1
        status = llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status:
        raise ValueError(f"llama_decode returned {status}")


def run(tensors: dict[str, torch.Tensor], observe: bool) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Every row of tokens by itself, from an empty cache.

    Args:
        tensors: `tokens`, int64 [rows, length].
        observe: whether to copy the inputs and outputs of products.

    Returns:
        The products of the graph, in order: the weight's name, empty for others, the operator and the weight's type;
        `logits`, float32 [rows, length, vocabulary]; for product n `n.input` and `n.output` [rows * length, features],
        and for those of experts `n.experts`, the ones chosen [rows * length, experts]; for flash attention of layer n
        `attention{n}.query` [rows, heads, length, size], `.key` and `.value`, the cache as it is stored, uint8
        [rows, heads, length, bytes], `.written_key` and `.written_value`, what was written into it, float32
        [rows, length, heads * size], `.scale` of the scores [rows, 1], and `.output` [rows, length, heads, size].
    """
    rows = tensors["tokens"]
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(_Loaded.model))
    watches, logits = [], []
    watch = _Watch(observe)
    context = _context(rows.shape[1], watch if observe else None)
    try:
        for row in rows.tolist():
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            _decode(context, row, 0, all_logits=True)
            values = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(row), vocabulary))
            logits.append(torch.from_numpy(values.copy()))
            watches.append((watch.products, watch.tensors))
            watch.products, watch.tensors, watch.attentions = [], {}, 0
    finally:
        llama_cpp.llama_free(context)
    joined = {name: torch.cat([found[name] for _, found in watches]) for name in watches[0][1]}
    return watches[0][0], {"logits": torch.stack(logits), **joined}


def step(tensors: dict[str, torch.Tensor]) -> tuple[None, dict[str, torch.Tensor]]:
    """The `logits` float32 [rows, length, vocabulary] of `tokens` int64 [rows, length], decoded one by one."""
    rows = tensors["tokens"]
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(_Loaded.model))
    logits = torch.empty(*rows.shape, vocabulary)
    context = _context(rows.shape[1])
    try:
        for number, row in enumerate(rows.tolist()):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            for place, token in enumerate(row):
                _decode(context, [token], place, all_logits=True)
                values = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (vocabulary,))
                logits[number, place] = torch.from_numpy(values.copy())
    finally:
        llama_cpp.llama_free(context)
    return None, {"logits": logits}


def products(tensors: dict[str, torch.Tensor]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The products of the graph for the row `tokens` [length], as `run` has them."""
    watch = _Watch(copies=False)
    context = _context(len(tensors["tokens"]), watch)
    try:
        _decode(context, tensors["tokens"].tolist(), 0, all_logits=True)
    finally:
        llama_cpp.llama_free(context)
    return watch.products, {}


def speed(
    tensors: dict[str, torch.Tensor], generated: int, runs: int
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Tokens a second with llama.cpp's own defaults for the cache and attention: the best of some runs.

    Args:
        tensors: `tokens`, int64 [length], the prompt.
        generated: how many tokens are decoded one by one behind it.
        runs: how often.
    """
    row = tensors["tokens"].tolist()
    prompt, decoding = [], []
    context = _context(len(row) + generated, exact=False)
    try:
        for _ in range(runs + 1):  # the first run warms caches up
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            start = time.perf_counter()
            _decode(context, row, 0, all_logits=False)
            between = time.perf_counter()
            for number in range(generated):
                _decode(context, [row[number % len(row)]], len(row) + number, all_logits=False)
            decoding.append(time.perf_counter() - between)
            prompt.append(between - start)
    finally:
        llama_cpp.llama_free(context)
    return {"prompt": len(row) / min(prompt[1:]), "decoding": generated / min(decoding[1:])}, {}


def requantize(
    tensors: dict[str, torch.Tensor], path: str, output: str, kind: str, pure: bool = False
) -> tuple[None, dict[str, torch.Tensor]]:
    """llama-quantize: a float GGUF file by llama.cpp's own quantisers and choice of types.

    Args:
        tensors: none.
        path: of the float file.
        output: of the new one.
        kind: llama-quantize's name of the file type in small letters, such as `q4_k_m`; `q4_k` is `q4_k_m`.
        pure: every matrix in one type.
    """
    name = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}.get(kind, kind).upper()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    parameters.pure = pure
    parameters.nthread = torch.get_num_threads()
    status = llama_cpp.llama_model_quantize(path.encode(), output.encode(), ctypes.byref(parameters))
    if status:
        raise ValueError(f"llama_model_quantize returned {status}")
    return None, {}
