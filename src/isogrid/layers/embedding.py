"""The quantised Embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.layers.integer import IntegerEmbedding
from isogrid.layers.weights import weight_of
from isogrid.quantizers import Quantizer


class QuantizedEmbedding(nn.Embedding):
    """torch.nn.Embedding whose table is quantised; made by `isogrid.prepare`.

    Indices [...] to float vectors [..., embedding_dim], the values that the stored codes stand for.
    """

    weight_quantizer: Quantizer

    def forward(self, input: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return F.embedding(
                input,
                self.weight_quantizer(weight_of(self)),
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )

    @torch.no_grad()
    def to_integer(self) -> nn.Module:
        """The layer that stores codes."""
        quantized = self.weight_quantizer.quantize(weight_of(self))
        scale = quantized.affine.scale
        assert scale is not None
        return IntegerEmbedding(quantized.codes.to(torch.int8), scale.expand(self.num_embeddings, -1).contiguous())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight_quantizer.format}"
