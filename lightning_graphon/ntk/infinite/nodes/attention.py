r"""Attention of infinitely many heads: k⁺ = E[A k_v A'ᵀ] over virtual heads, which are drawn.

A head's queries and keys are Gaussian with the kernels of their layers, in as many dimensions as a head has. With
A = softmax(s q kᵀ) and T(B) = A (k_v∘B) A'ᵀ - ((A k_v)∘(A B)) A'ᵀ - A ((k_v A'ᵀ)∘(B A'ᵀ)) + (A k_v A'ᵀ)∘(A B A'ᵀ),

.. math:: t⁺ = E[A t_v A'ᵀ] + s² E[t_q ∘ T(k k'ᵀ) + (q q'ᵀ) ∘ T(t_k)] .
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon._shared.random import generator
from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.nodes.heads import (
    between_tokens,
    check_independent,
    every_pair,
    head_places,
    head_reads,
    head_shares,
)
from lightning_graphon.ntk.infinite.pairs import Pairs
from lightning_graphon.ntk.infinite.setting import Setting
from lightning_graphon.tracing.steps import Attention
from lightning_graphon.tracing.tracer import refusal

_HEADS = 512
_JITTER = 1e-10  # of the largest variance, so that covariances of equal rows have a root


class AttentionNode(Node):
    """Needs the queries' and keys' kernels between all samples, to draw heads that all tiles share."""

    step: Attention

    def build(self, setting: Setting) -> None:
        """Bins of each head's queries and keys, and which heads a bin of the values belongs to."""
        query, key, value = self.inputs
        if setting.propagate == "drift":
            raise refusal(f"{self.step.label} with propagate='drift'")
        self.places = head_places(self)
        check_independent(self)
        self.gaussian, self.centred, self.uses_means = False, value.centred, not value.centred
        self.atoms = {atom: units[self.step.value.units.reshape(-1)] for atom, units in value.atoms.items()}
        self.query_bins = query.bin_of_unit[self.step.query.units]  # [heads, width]
        self.key_bins = key.bin_of_unit[self.step.key.units]
        self.share, self.value_bins = head_shares(self)
        self.head_of_draw = torch.arange(_HEADS) % len(self.query_bins)
        self.queries = self.keys = torch.empty(0)

    # ---- virtual heads

    @property
    def drawn_inputs(self) -> dict[int, Pairs]:
        """Inputs whose kernels between all samples are needed for the draw, at these pairs."""
        places = (self.step.query.positions, self.step.key.positions)
        return {i: every_pair(p, self.inputs[i].step.positions) for i, p in enumerate(places)}

    def draw(self, kernels: Sequence[Tensor]) -> None:
        """Queries and keys [draws, N, tokens, width] from their kernels."""
        random = generator(0, "attention")
        parts = ((self.step.query, self.query_bins), (self.step.key, self.key_bins))
        self.queries, self.keys = (
            self._drawn(_by_token(kernel, part.positions, node.step.positions), bins, random)
            for kernel, node, (part, bins) in zip(kernels, self.inputs, parts, strict=False)
        )

    def _drawn(self, kernel: Tensor, bins: Tensor, random: torch.Generator) -> Tensor:
        """Arrays [draws, N, tokens, width] of a head's queries or keys; `kernel` is [K, N, tokens, N, tokens]."""
        size, (samples, tokens) = kernel.shape[1] * kernel.shape[2], kernel.shape[1:3]
        out = kernel.new_empty(_HEADS, bins.shape[1], size)
        noise = torch.randn(_HEADS, bins.shape[1], size, generator=random, dtype=torch.float64, device="cpu").to(out)
        for number, covariance in enumerate(kernel.reshape(-1, size, size)):
            here = bins[self.head_of_draw] == number
            out[here] = noise[here] @ _root(covariance).T
        return out.unflatten(2, (samples, tokens)).permute(0, 2, 3, 1)

    def _attention(self, part: slice) -> Tensor:
        """A [draws, samples, queries, keys]."""
        logits = self.step.scale * self.queries[:, part] @ self.keys[:, part].mT
        if self.step.mask is not None:
            mask = self.step.mask[self.head_of_draw % len(self.step.mask)]
            logits = logits + mask[:, None].to(logits)
        return logits.softmax(-1)

    # ---- kernels

    def reads(self, number: int, pairs: Pairs) -> Pairs:
        """Queries at the same pairs, keys and values at all."""
        return head_reads(self, number, pairs)

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """As in the formulas above, one pair of samples after the other."""
        left, right = self._attention(samples.rows), self._attention(samples.cols)
        places = [part.positions for part in (self.step.query, self.step.key, self.step.value)]
        fields = [between_tokens(field, own) for field, own in zip(inputs, places, strict=True)]
        n, m = inputs[0].k.shape[2:]
        k = inputs[0].k.new_empty(len(pairs), self.bins, n, m)
        t = torch.empty_like(k) if samples.tangent else None
        for i in range(n):
            for j in range(m):
                c = i if samples.paired else j
                ends = samples.rows.start + i, samples.cols.start + c
                both = self._pair(left[:, i], right[:, c], fields, (i, j), ends, t is not None)
                k[:, :, i, j] = both[0][:, pairs.first, pairs.second].T
                if t is not None and both[1] is not None:
                    t[:, :, i, j] = both[1][:, pairs.first, pairs.second].T
        return k, t

    def _pair(
        self, a: Tensor, b: Tensor, fields: list[tuple[Tensor, Tensor | None]], at: tuple[int, int],
        ends: tuple[int, int], tangent: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Kernels [K, queries, queries] of one pair of samples."""
        (_, tq), (_, tk), (kv, tv) = (tuple(None if f is None else f[:, at[0], at[1]] for f in two) for two in fields)
        assert kv is not None  # noqa: S101
        kv = kv[self.value_bins]
        weights = self._weights.to(kv)
        bt = b.mT
        left, right = a @ kv[:, None], kv[:, None] @ bt  # [K, draws, ..]
        mixed = left @ bt
        k = torch.einsum("ks,ksac->kac", weights, mixed)
        if not tangent:
            return k, None
        parts = [mixed * 0] if tv is None else [a @ tv[self.value_bins][:, None] @ bt]
        scale = self.step.scale**2

        def spread(inner: Tensor) -> Tensor:
            ab, ba = a @ inner, inner @ bt
            return a @ (kv[:, None] * inner) @ bt - (left * ab) @ bt - a @ (right * ba) + mixed * (ab @ bt)

        q, q2, key, key2 = (
            self.queries[:, ends[0]],
            self.queries[:, ends[1]],
            self.keys[:, ends[0]],
            self.keys[:, ends[1]],
        )
        for number in range(int(self.query_bins.max()) + 1):
            own = (self.query_bins[self.head_of_draw] == number).to(kv)[:, None, :]
            if tq is not None:
                parts.append(scale * tq[number] * spread((key * own) @ key2.mT))
        for number in range(int(self.key_bins.max()) + 1):
            own = (self.key_bins[self.head_of_draw] == number).to(kv)[:, None, :]
            if tk is not None:
                parts.append(scale * ((q * own) @ q2.mT) * spread(tk[number]))
        return k, torch.einsum("ks,ksac->kac", weights, torch.stack(parts).sum(0))

    @property
    def _weights(self) -> Tensor:
        """Weight [K, draws] of each virtual head in each bin of values."""
        count = torch.bincount(self.head_of_draw, minlength=self.share.shape[1])
        return (self.share / count)[:, self.head_of_draw]

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """Refused: E[A] μ_v would need the draws of these samples.

        Raises:
            NotReadableError: Always.
        """
        raise refusal(f"{self.step.label} over values that have a mean, which a later step asks for,")


def _by_token(kernel: Tensor, places: Tensor, positions: int) -> Tensor:
    """Kernels [R, K, N, N] of every pair of positions as [K, N, tokens, N, tokens]."""
    pairs = every_pair(places, positions)
    rows = pairs.find(places[:, None].expand(-1, len(places)), places.expand(len(places), -1))
    return kernel[rows].permute(2, 3, 0, 4, 1)


def _root(covariance: Tensor) -> Tensor:
    """A matrix R with R Rᵀ the covariance, which may be singular."""
    jitter = _JITTER * covariance.diagonal().amax() * torch.eye(len(covariance)).to(covariance)
    factor, failed = torch.linalg.cholesky_ex(covariance + jitter)
    if not bool(failed):
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()
