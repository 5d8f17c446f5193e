r"""Attention without a softmax: (F ∘ q kᵀ) v with a factor F of scale and mask, and independent q, k and v.

Of i ≠ j the means of q_i k_i q_j' k_j' vanish, so that for a head of any width, exactly,

.. math:: k⁺(a,c) = \sum_i k_{q_i}(a,c) \sum_{bd} F_{ab} F_{cd}\, k_{k_i}(b,d)\, k_v(b,d)

and t⁺ is the same with one of the three kernels after the other replaced by its tangent kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.nodes.heads import (
    between_tokens,
    check_independent,
    head_places,
    head_reads,
    head_shares,
)
from lightning_graphon.ntk.infinite.pairs import Pairs
from lightning_graphon.ntk.infinite.setting import Setting
from lightning_graphon.tracing.steps import LinearAttention
from lightning_graphon.tracing.tracer import refusal


class LinearAttentionNode(Node):
    """Products of the kernels of queries, keys and values."""

    step: LinearAttention

    def build(self, setting: Setting) -> None:
        """How often each pair of bins of a query and its key comes in the heads of each bin."""
        step, (query, key, value) = self.step, self.inputs
        if setting.propagate == "drift":
            raise refusal(f"{step.label} with propagate='drift'")
        check_independent(self)
        if not (query.centred or key.centred):
            raise refusal(f"{step.label} without a softmax, whose queries and keys both have a mean,")
        self.places = head_places(self)
        self.atoms = {atom: units[step.value.units.reshape(-1)] for atom, units in value.atoms.items()}
        self.gaussian, self.centred, self.random_slope = False, True, True
        share, self.value_bins = head_shares(self)
        heads, width = step.query.units.shape
        count = torch.zeros(heads, query.bins, key.bins, dtype=torch.float64)
        bins = query.bin_of_unit[step.query.units], key.bin_of_unit[step.key.units]
        count.index_put_(
            (torch.arange(heads)[:, None], *bins), torch.ones(heads, width, dtype=count.dtype), accumulate=True
        )
        tokens = len(step.query.positions), len(step.key.positions)
        mask = torch.ones(1, *tokens, dtype=torch.float64) if step.mask is None else step.mask
        alike = bool((mask == mask[:1]).all())
        self.factors = step.scale * (mask[:1] if alike else mask)  # [1 or heads, queries, keys]
        weights = share[:, :, None, None] * count  # [K, heads, K_q, K_k]
        self.weights = weights.sum(1, keepdim=True) if alike else weights

    def reads(self, number: int, pairs: Pairs) -> Pairs:
        """Queries at the same pairs, keys and values at all."""
        return head_reads(self, number, pairs)

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """As in the formula above."""
        query, key, value = inputs
        places = self.step.query.positions
        rows = query.pairs.find(places[pairs.first], places[pairs.second])
        kq, tq = (None if f is None else f[rows] for f in (query.k, query.t))
        kk, tk = between_tokens(key, self.step.key.positions)
        kv, tv = (None if f is None else f[self.value_bins] for f in between_tokens(value, self.step.value.positions))
        assert kq is not None  # noqa: S101
        assert kv is not None  # noqa: S101
        k = self._product(kq, kk, kv, pairs)
        if not samples.tangent:
            return k, None
        found = [
            self._product(a, b, c, pairs)
            for a, b, c in ((tq, kk, kv), (kq, tk, kv), (kq, kk, tv))
            if a is not None and b is not None and c is not None
        ]
        return k, torch.stack(found).sum(0) if found else None

    def _product(self, query: Tensor, key: Tensor, value: Tensor, pairs: Pairs) -> Tensor:
        """[pairs, K, n, m] of queries [pairs, K_q, n, m], keys [K_k, n, m, tokens, tokens] and values [K, ...]."""
        out = query.new_zeros(len(pairs), self.bins, *query.shape[2:])
        for factor, weights in zip(self.factors.to(query), self.weights.to(query).unbind(1), strict=True):
            for number, own in enumerate(key):
                left = torch.einsum("oq,rqnm->ronm", weights[..., number], query)
                inner = factor @ (own * value) @ factor.T  # [K, n, m, queries, queries]
                out += left * inner[..., pairs.first, pairs.second].permute(3, 0, 1, 2)
        return out
