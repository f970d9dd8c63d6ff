"""A GGUF file in llama.cpp: running it, and looking at what it really computes."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from isogrid.errors import ArtifactError, TargetError
from isogrid.formats import Quantized, named_format
from isogrid.layers.stored import StoredWeight
from isogrid.targets.artifact import Artifact
from isogrid.targets.gguf_base import float_values, open_gguf
from isogrid.targets.gguf_tensors import FORMATS, TERNARY, RowOrder, in_one, unpacked
from isogrid.targets.llamacpp_cache import attention_states
from isogrid.targets.runtime import Observed, RuntimeOperator
from isogrid.targets.subprocesses import Worker

LAYERS_KEY = "isogrid.layers"
"""Metadata of a file: which layers of the model its tensors belong to, as JSON."""


FLOAT_CACHE = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
"""What is asked of llama.cpp where nothing else was trained: its default, float16, rounds keys and values."""


class Speed(NamedTuple):
    """Tokens a second: of a prompt at once, and of single tokens behind it."""

    prompt: float
    decoding: float


class LlamaFile:
    """Any GGUF file in llama.cpp, on the CPU; call it with tokens.

    Args:
        path: of the file.
        threads: 0 for as many as torch takes.
        options: `type_k` and `type_v` of the cache and `flash_attn`, as llama.cpp's command line has them; a cache in
            float32 without flash attention if not given.

    Raises:
        MissingExtraError: there is no llama-cpp-python.
        TargetError: llama.cpp cannot load the file.
    """

    def __init__(self, path: str | Path, threads: int = 0, options: Mapping[str, str] = FLOAT_CACHE):
        self.path = Path(path)
        self.worker = Worker("llamacpp")
        facts = self.worker.call("load", path=str(self.path.resolve()), threads=threads, options=dict(options)).value
        self.context, self.vocabulary = int(facts["context"]), int(facts["vocabulary"])

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits float32 [rows, length, vocabulary] of tokens [rows, length], each row by itself."""
        return self.run(input_ids)[1]["logits"]

    def run(self, input_ids: Tensor, observe: bool = False) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """As the worker's function of this name, `isogrid/targets/workers/llamacpp.py`."""
        self._check(input_ids)
        answer = self.worker.call("run", {"tokens": input_ids.to(torch.int64)}, observe=observe)
        return answer.value, answer.tensors

    def stepped(self, input_ids: Tensor) -> Tensor:
        """Logits as by a call, but every token by itself behind those before it, which are in the cache."""
        self._check(input_ids)
        return self.worker.call("step", {"tokens": input_ids.to(torch.int64)}).tensors["logits"]

    def tokens_per_second(self, input_ids: Tensor, generated: int = 32, runs: int = 3) -> Speed:
        """How fast it is with llama.cpp's defaults, the best of some runs.

        Args:
            input_ids: the prompt, [length], or [rows, length], of which the first row is taken.
            generated: how many tokens are decoded one by one behind the prompt.
            runs: how often.
        """
        generated = min(generated, self.context // 2)
        row = input_ids.reshape(-1, input_ids.shape[-1])[0][: self.context - generated]
        self._check(row[None])
        answer = self.worker.call("speed", {"tokens": row.to(torch.int64)}, generated=generated, runs=runs)
        return Speed(**answer.value)

    def products(self, length: int = 1) -> list[dict[str, Any]]:
        """The products of the graph for a row of this length, as the worker has them."""
        value: list[dict[str, Any]] = self.worker.call("products", {"tokens": torch.zeros(length).long()}).value
        return value

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.dtype.is_floating_point:
            raise TargetError(f"{self.path} takes tokens [rows, length], not {tokens.dtype} {list(tokens.shape)}.")
        if tokens.shape[1] > self.context:
            raise TargetError(
                f"{self.path} computes what was trained up to {self.context} tokens, and these rows have "
                f"{tokens.shape[1]}. Cut them."
            )
        if not tokens.numel():
            raise TargetError(f"{self.path} was given no tokens. Give it at least one row of at least one.")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocabulary:
            raise TargetError(f"{self.path} has tokens 0 to {self.vocabulary - 1}; these go beyond.")


class LlamaCppModel:
    """An artefact in llama.cpp; call it with tokens.

    Args:
        artifact: read and checked.
        threads: 0 for as many as torch takes.
    """

    def __init__(self, artifact: Artifact, threads: int = 0):
        self.artifact = artifact
        self.file = LlamaFile(artifact.path, threads, artifact.session_options)
        self.input_names = ["input_ids"]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The logits, float32 [rows, length, vocabulary], of tokens [rows, length]."""
        return [self.file(self._tokens(inputs))]

    def observe(self, *inputs: Tensor) -> Observed:
        """Run with the input and the output of every layer in view, the bias added as the runtime adds it."""
        tokens = self._tokens(inputs)
        products, tensors = self.file.run(tokens, observe=True)
        layers: dict[str, tuple[Tensor, Tensor]] = {}
        for number, product in enumerate(products):
            layer = self._layer_of(product)
            if layer and f"{number}.input" in tensors:
                ends = tensors[f"{number}.input"], tensors[f"{number}.output"], tensors.get(f"{number}.experts")
                x, y = self._arranged(product["weight"], tokens.shape, *ends)
                layers[layer] = x, y + layers[layer][1] if layer in layers else y
        return Observed([tensors["logits"]], {}, layers, states=attention_states(self.artifact, tensors))

    def _arranged(
        self, weight: str, shape: torch.Size, input: Tensor, output: Tensor, experts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Input and output of a product as the model's layer has them; of experts, rows sorted by expert."""
        if experts is None:
            return input.reshape(*shape, -1), self._completed(weight, output.reshape(*shape, -1))
        chosen = experts.shape[-1]
        expert, order = experts.reshape(-1).to(torch.int64).sort(stable=True)
        y = self._completed(weight, output.reshape(-1, output.shape[-1])[order], expert)
        rows = input.reshape(-1, input.shape[-1])
        return rows[order if len(rows) == len(order) else order // chosen], y

    def tokens_per_second(self, input_ids: Tensor, generated: int = 32, runs: int = 3) -> Speed:
        """See `LlamaFile.tokens_per_second`."""
        return self.file.tokens_per_second(input_ids, generated, runs)

    def stored(self) -> Mapping[str, Tensor]:
        """Codes of every quantised weight, its scales and what these are made of, as `isogrid.convert` names them."""
        found: dict[str, Tensor] = {}
        parts: dict[str, dict[str, tuple[RowOrder, np.ndarray[Any, Any], gguf.ReaderTensor]]] = {}
        for name, entry in self._layers.items():
            for path in entry["paths"]:
                tensor = self._tensors[name]
                parts.setdefault(path, {})[name] = RowOrder(**entry["order"]), np.asarray(tensor.data), tensor
        formats = {layer.path: self.artifact.plan.site(layer.weight).format for layer in self.artifact.plan.layers}
        for path, pieces in parts.items():
            quantized = self._joined(pieces)
            if named_format(formats[path]) == TERNARY:
                quantized = in_one(quantized)
            found |= {f"{path}.{part}": codes for part, codes in StoredWeight(quantized).named_buffers()}
            biases = {name: self._tensors.get(f"{name.removesuffix('.weight')}.bias") for name in pieces}
            whole = [_back(float_values(bias).flatten(), pieces[name][0]) for name, bias in biases.items() if bias]
            if whole:
                found[f"{path}.bias"] = torch.stack(whole).sum(0)
        return found

    def multiplications(self) -> tuple[RuntimeOperator, ...]:
        """The products of llama.cpp's graph, in order; by quantised weights they are of integers."""
        found, seen = [], set()
        for product in self.file.products():
            layer = self._layer_of(product)
            if layer and layer in seen:  # a half of the products of experts, whose other half is there
                continue
            seen.add(layer)
            arithmetic: Literal["integer", "float"] = "integer"
            if product["type"] == "f32" or not product["weight"]:
                arithmetic = "float"
            found.append(RuntimeOperator(layer, f"{product['operator']} ({product['type']})", arithmetic))
        return tuple(found)

    def producers(self) -> Mapping[str, RuntimeOperator]:
        """None: activations have no sites of their own here."""
        return {}

    def _layer_of(self, product: Mapping[str, Any]) -> str:
        """The layer behind a product; of those that share a tensor the last, which is the output."""
        entry = self._layers.get(product["weight"])
        return "" if entry is None else str(entry["paths"][-1])

    def _completed(self, name: str, output: Tensor, expert: Tensor | None = None) -> Tensor:
        """A product with its tensor's scale and bias, features in the model's order, zeros for those it has not.

        Args:
            name: of the tensor.
            output: [..., features].
            expert: of each row, where it is a product of experts.
        """
        stem = name.removesuffix(".weight")
        order = RowOrder(**self._layers[name]["order"])
        for ending, combine in ((".scale", torch.mul), (".bias", torch.add)):
            if stem + ending in self._tensors:
                values = float_values(self._tensors[stem + ending])
                if expert is not None:
                    values = values.reshape(order.experts, -1)[expert]
                output = combine(output, values)
        return _back(output, replace(order, experts=0))

    def _joined(self, pieces: Mapping[str, tuple[RowOrder, np.ndarray[Any, Any], gguf.ReaderTensor]]) -> Quantized:
        """A weight of the pieces that hold its rows."""
        rows = sum(data[..., 0].size for _, data, _ in pieces.values())
        whole: np.ndarray[Any, Any] | None = None
        for order, data, _ in pieces.values():
            flat = data.reshape(-1, data.shape[-1])
            whole = np.zeros((rows, data.shape[-1]), data.dtype) if whole is None else whole
            whole[order.indices(rows).numpy()] = flat
        assert whole is not None
        name, (_, _, tensor) = next(iter(pieces.items()))
        kind, shape = tensor.tensor_type, (rows, int(tensor.shape[0]))
        fmt = named_format(FORMATS.get(kind, "float16"))
        value = unpacked(whole.view(np.uint8), kind, shape, fmt)
        if isinstance(value, Tensor):
            raise ArtifactError(f"{self.artifact.path}: {name} is float, and the layer it belongs to is quantised.")
        return self._scaled(value, name)

    def _scaled(self, value: Quantized, name: str) -> Quantized:
        """With the scale of the whole tensor, which no block holds."""
        scale = self._tensors.get(name.removesuffix(".weight") + ".scale")
        if scale is not None and value.scale is not None and value.scale.scale is not None:
            value.scale.scale.codes.copy_(float_values(scale)[:1].reshape(value.scale.scale.codes.shape))
        return value

    def _tokens(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if len(inputs) != 1:
            raise TargetError(f"{self.artifact.path} takes one input, input_ids, not {len(inputs)}.")
        return inputs[0].detach()

    @cached_property
    def _tensors(self) -> dict[str, gguf.ReaderTensor]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def _layers(self) -> dict[str, dict[str, Any]]:
        field = self._reader.get_field(LAYERS_KEY)
        if field is None:
            raise ArtifactError(f"{self.artifact.path} was not written by isogrid.export. Export it again.")
        found: dict[str, dict[str, Any]] = json.loads(field.contents())
        return found

    @cached_property
    def _reader(self) -> gguf.GGUFReader:
        return open_gguf(self.artifact.path)


def _back(values: Tensor, order: RowOrder) -> Tensor:
    """Features [..., n] of a file in the order of the model, zeros for those that the file has elsewhere."""
    back = values.new_zeros(*values.shape[:-1], values.shape[-1] * order.parts)
    back[..., order.indices(back.shape[-1])] = values
    return back
