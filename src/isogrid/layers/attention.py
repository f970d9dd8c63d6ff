"""torch.nn.MultiheadAttention as three projections, attention and an output projection."""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.layers.borrowed import TakenApart


class ProjectedAttention(TakenApart, nn.MultiheadAttention):
    """MultiheadAttention whose products are layers and functions that can be sites; made by `isogrid.prepare`.

    Its parameters keep their names and shapes, packed or not. Where no weights are asked for, it calls
    `scaled_dot_product_attention`, as the float module does.
    """

    def add_products(self) -> None:
        size = self.embed_dim
        for number, name in enumerate("qkv"):
            rows = (number * size, (number + 1) * size)
            linear = f"{name}_projection"
            bias = None if self.in_proj_bias is None else "in_proj_bias"
            if self._qkv_same_embed_dim:
                self.borrow(linear, "in_proj_weight", bias, rows=rows)
            else:
                self.borrow(linear, f"{name}_proj_weight", bias, bias_rows=rows)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the float module."""
        is_batched = query.dim() == 3
        if is_batched and not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        elif not is_batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self.q_projection(query), self.k_projection(key), self.v_projection(value)  # type: ignore[operator]
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, bias.expand(x.shape[0], -1, -1)], 1) for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            more += 1
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1) for x in (k, v))
            more += 1
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, more, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = torch.matmul(q, k.transpose(-2, -1)) * sqrt(1.0 / q.shape[-1])
            weights = F.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = torch.matmul(weights, v)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _mask(self, attention: Tensor | None, padding: Tensor | None, more: int, q: Tensor) -> Tensor | None:
        """What is added to the scores [batch, heads, queries, keys]; `more` keys at the end are seen by all."""
        if attention is not None and attention.dim() == 3:
            attention = attention.reshape(-1, self.num_heads, *attention.shape[1:])
        padding = None if padding is None else padding[:, None, None, :]
        parts = []
        for mask in (attention, padding):
            if mask is not None:
                if mask.dtype == torch.bool:
                    mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
                parts.append(F.pad(mask, (0, more)) if more else mask)
        return parts[0] + parts[1] if len(parts) == 2 else parts[0] if parts else None
