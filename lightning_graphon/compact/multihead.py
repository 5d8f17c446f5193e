"""torch's attention module with fewer heads than its width has."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


class SmallMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` some of whose heads are gone; parameters have the same names.

    Args:
        module: One whose parameters are cut already.
        num_heads: Number of heads that stay.
        head_dim: Their width.
    """

    _qkv_same_embed_dim = False  # TransformerEncoderLayer asks; its fused kernel needs all heads

    def __init__(self, module: nn.MultiheadAttention, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias, self.out_proj = (
            module.in_proj_weight,
            module.in_proj_bias,
            module.out_proj,
        )
        self.num_heads, self.head_dim, self.dropout = num_heads, head_dim, module.dropout
        self.embed_dim, self.batch_first = module.embed_dim, module.batch_first
        self.training = module.training

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `nn.MultiheadAttention`."""
        swap = not self.batch_first and query.ndim == 3
        if swap:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, query, key, is_causal)
        q, k, v = self._project(query, key, value)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = (logits if mask is None else logits + mask).softmax(-1)
            out = nn.functional.dropout(weights, dropout) @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(-3, -2).flatten(-2))
        return out.transpose(0, 1) if swap else out, weights

    def _project(self, *tensors: Tensor) -> list[Tensor]:
        """Queries, keys and values [..., heads, tokens, width]."""
        weights = self.in_proj_weight.chunk(3)
        biases: Any = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        found = [linear(t, w, b) for t, w, b in zip(tensors, weights, biases, strict=True)]
        return [t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2) for t in found]

    def _mask(
        self, mask: Tensor | None, padding: Tensor | None, query: Tensor, key: Tensor, is_causal: bool
    ) -> Tensor | None:
        """What is added to the logits; heads of a mask that has some are those of the dense network, and not known."""
        if mask is None and is_causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
        added = [
            self._added(m, query)
            for m in (mask, None if padding is None else padding[..., None, None, :])
            if m is not None
        ]
        if mask is not None and mask.ndim == 3:
            raise ValueError("a mask for each head was made for another number of heads")
        return sum(added[1:], added[0]) if added else None

    @staticmethod
    def _added(mask: Tensor, query: Tensor) -> Tensor:
        """True leaves out."""
        return (
            torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -torch.inf)
            if mask.dtype == torch.bool
            else mask
        )
