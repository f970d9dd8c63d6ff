"""The quantised Embedding and EmbeddingBag."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.formats import Quantized
from isogrid.layers.adapters import made_of
from isogrid.layers.integer import IntegerEmbedding, uncounted
from isogrid.layers.stored import StoredEmbedding
from isogrid.layers.weights import base_of, weight_of
from isogrid.quantizers import Quantizer


class QuantizedTable(nn.Module):
    """Mixin of layers that look rows up in a quantised table.

    Attributes:
        weight_quantizer: owned, or that of a layer that shares the weight.
        keeps_format: `convert` keeps the table as its format stores it, instead of as int8 codes with float32 scales.
    """

    num_embeddings: int
    weight_quantizer: Quantizer
    keeps_format: bool

    def table(self) -> Tensor:
        """The table as stored, float [entries, dimension]."""
        return self.weight_quantizer(base_of(self), made_of(self))  # type: ignore[no-any-return]

    @torch.no_grad()
    def stored_codes(self) -> tuple[Tensor, Tensor]:
        """int8 [entries, dimension], and scales [entries, groups]."""
        quantized = self.weight_quantizer.quantize(weight_of(self))
        scale = quantized.affine.scale
        assert scale is not None
        return quantized.codes.to(torch.int8), scale.expand(self.num_embeddings, -1).contiguous()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight_quantizer.format}"


class QuantizedEmbedding(QuantizedTable, nn.Embedding):
    """torch.nn.Embedding whose table is quantised; made by `isogrid.prepare`.

    Indices [...] to float vectors [..., embedding_dim], the values that the stored codes stand for.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return F.embedding(
                input,
                self.table(),
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )

    def to_integer(self) -> nn.Module:
        """The layer that stores codes."""
        if self.keeps_format:
            with torch.no_grad():
                weight = weight_of(self)
                return StoredEmbedding(self.weight_quantizer.quantize(weight), weight.dtype)
        return IntegerEmbedding(*self.stored_codes())


class QuantizedEmbeddingBag(QuantizedTable, nn.EmbeddingBag):
    """torch.nn.EmbeddingBag whose table is quantised; made by `isogrid.prepare`.

    Indices [batch, bag], or [all] with the offsets of the bags, to float vectors [batch, embedding_dim].
    """

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        with torch._C.DisableTorchFunction():
            table = self.table()

            def rows(index: Tensor) -> Tensor:
                return F.embedding(index, table, self.padding_idx)

            return pooled_rows(self, rows, input, offsets, per_sample_weights)

    def to_integer(self) -> nn.Module:
        """The layer that stores codes."""
        if self.keeps_format:
            with torch.no_grad():
                weight = weight_of(self)
                return StoredEmbeddingBag(self, self.weight_quantizer.quantize(weight), weight.dtype)
        return IntegerEmbeddingBag(self, *self.stored_codes())


class IntegerEmbeddingBag(IntegerEmbedding):
    """Bags of rows of codes, each with its scale.

    Args:
        bag: its mode, padding and order of offsets.
        weight, weight_scale: as for IntegerEmbedding.
    """

    def __init__(self, bag: nn.EmbeddingBag, weight: Tensor, weight_scale: Tensor) -> None:
        super().__init__(weight, weight_scale)
        self.mode, self.padding_idx, self.include_last_offset = bag.mode, bag.padding_idx, bag.include_last_offset

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        return pooled_rows(self, super().forward, input, offsets, per_sample_weights)


class StoredEmbeddingBag(StoredEmbedding):
    """Bags of rows of a stored table.

    Args:
        bag: its mode, padding and order of offsets.
        quantized, dtype: as for StoredEmbedding.
    """

    def __init__(self, bag: nn.EmbeddingBag, quantized: Quantized, dtype: torch.dtype) -> None:
        super().__init__(quantized, dtype)
        self.mode, self.padding_idx, self.include_last_offset = bag.mode, bag.padding_idx, bag.include_last_offset

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        with uncounted():
            return pooled_rows(self, super().forward, input, offsets, per_sample_weights)


def pooled_rows(
    bag: Any, rows: Callable[[Tensor], Tensor], input: Tensor, offsets: Tensor | None, weights: Tensor | None
) -> Tensor:
    """Sum, mean or maximum of each bag's rows, in one order of addition for training and deployment.

    Args:
        bag: mode, padding_idx and include_last_offset, as in torch.nn.EmbeddingBag.
        rows: from indices to float vectors.
        input, offsets, weights: the arguments of its forward.
    """
    if input.dim() == 1:
        table = rows(input)  # a row for each index
        index = torch.arange(len(input), device=input.device)
        if bag.padding_idx is not None:  # where a row does not count, an entry that is one more
            table, index = torch.cat([table, table[:1]]), index.where(input != bag.padding_idx, len(input))
        padding = None if bag.padding_idx is None else len(input)
        options: Any = {"mode": bag.mode, "padding_idx": padding, "include_last_offset": bag.include_last_offset}
        return F.embedding_bag(index, table, offsets, per_sample_weights=weights, **options)
    found = rows(input)
    found = found if weights is None else found * weights.unsqueeze(-1)
    counts = torch.ones_like(input) if bag.padding_idx is None else (input != bag.padding_idx).to(input.dtype)
    counts = counts.unsqueeze(-1).to(found.dtype)
    if bag.mode == "max":
        best = torch.where(counts > 0, found, -torch.inf).amax(1)
        return torch.where(counts.sum(1) > 0, best, 0.0)
    total = (found * counts).sum(1)
    return total if bag.mode == "sum" else total / counts.sum(1).clamp(min=1.0)
