"""A layer's part of the tangent kernel from the factors of its gradients, never from a stored Jacobian.

Modes: "mean" sums over outputs to [N, M], "per_output" gives [C, N, M], "full" gives [N, C, M, C], "samples" sums the
kernels of each sample with itself to [C, C]. The caller divides.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_graphon.ntk.empirical.gradient_factors import GradientFactors
from lightning_graphon.ntk.empirical.masked_gram import row_gram

Mode: TypeAlias = Literal["mean", "per_output", "full", "samples"]


def layer_gram(left: GradientFactors, right: GradientFactors, weight: Tensor | None, mode: Mode, budget: int) -> Tensor:
    """Σ weight · ∂f ∂f' over one weight, in a mode, with `budget` bytes for temporary tensors.

    `left` and `right` are the same object where the block is symmetric, which "samples" needs. `weight` is
    [groups, rows, cols], or None for ones.
    """
    if not left.is_outer_product:
        if weight is None and mode == "samples" and _self_positions_are_cheaper(left):
            return _self_position_gram(left, budget)
        if weight is None and mode == "mean" and _positions_are_cheaper(left, right):
            return _position_gram(left, right, budget)
        return _by_gradients(left, right, weight, mode, budget)
    # One position and one group: inputs H [N, cols] and signals G [N, C, rows].
    weight = None if weight is None else weight[0]
    H, G = left.col_factors[:, 0, 0, 0], left.row_factors[:, :, 0, 0]
    if mode == "samples":
        size = H.square().sum(1, keepdim=True) if weight is None else H.square() @ weight.T
        return contract(G * size[:, None], G, mode)
    H2, G2 = (H, G) if left is right else (right.col_factors[:, 0, 0, 0], right.row_factors[:, :, 0, 0])
    if mode == "mean":
        # Without a mask the kernel of a linear layer is a product of two Gram matrices.
        return (H @ H2.T) * contract(G, G2, mode) if weight is None else row_gram(H, G, H2, G2, weight, budget)
    if weight is None:
        gram, base = contract(G, G2, mode), H @ H2.T
        return gram * (base[:, None, :, None] if mode == "full" else base)
    blocks = [_with_one_sample(H, G, h, g, weight, mode) for h, g in zip(H2, G2, strict=True)]
    return torch.stack(blocks, dim=2)


def contract(left: Tensor, right: Tensor, mode: Mode) -> Tensor:
    """Gram matrix of gradients [N, C, p] and [M, C, p] in a mode."""
    if mode == "mean":
        return left.flatten(1) @ right.flatten(1).T
    if mode == "per_output":
        return left.transpose(0, 1) @ right.permute(1, 2, 0)
    if mode == "samples":
        return (left @ right.mT).sum(0)
    n, c, m = len(left), left.shape[1], len(right)
    return (left.flatten(0, 1) @ right.flatten(0, 1).T).reshape(n, c, m, c)


def squared_norm(factors: GradientFactors, weight: Tensor | None, budget: int) -> float:
    """Trace of the layer's part of the full kernel."""
    if factors.is_outer_product:
        g2, h2 = factors.row_factors[:, :, 0, 0].square().sum(1), factors.col_factors[:, 0, 0, 0].square()
        if weight is None:
            return float((g2.sum(1) * h2.sum(1)).sum())
        return float(((g2 @ weight[0]) * h2).sum())
    return sum(float((a * b).sum()) for a, b in _jacobian_blocks(factors, factors, weight, budget))


def _with_one_sample(H: Tensor, G: Tensor, h: Tensor, g: Tensor, weight: Tensor, mode: Mode) -> Tensor:
    """Kernel of all samples with one other."""
    # Σ_j P_ij H_nj h_j is shared by all pairs of outputs.
    shared = G * ((H * h) @ weight.T)[:, None]
    return shared @ g.T if mode == "full" else torch.einsum("nkr,kr->kn", shared, g)


def _positions_are_cheaper(left: GradientFactors, right: GradientFactors) -> bool:
    """Whether Gram matrices of the factors take fewer operations than the gradients themselves."""
    t, groups, rows = left.row_factors.shape[2:]
    cols, outputs = left.col_factors.shape[4], left.outputs
    n, m = left.samples, right.samples
    # Operations of the two Gram matrices over pairs of positions, against those of the gradients and their product.
    direct = n * m * t * t * (cols * left.col_factors.shape[1] + rows * left.row_factors.shape[1]) * groups
    gradients = groups * rows * cols * outputs * ((n + m) * t + n * m)
    return direct < gradients


def _position_gram(left: GradientFactors, right: GradientFactors, budget: int) -> Tensor:
    """Σ_tt' (Σ_k δ δ')(h h') for all pairs of samples, a few left samples at a time."""
    t, groups = left.row_factors.shape[2:4]
    # Both Gram matrices and their product.
    per_sample = 3 * t * t * groups * right.samples * left.row_factors.element_size()
    step = max(1, budget // max(1, per_sample))
    rows = []
    for i in range(0, left.samples, step):
        part = slice(i, i + step)
        a = torch.einsum("nktgr,mksgr->gntms", left.row_factors[part], right.row_factors)
        b = torch.einsum("nktgc,mksgc->gntms", left.col_factors[part], right.col_factors)
        rows.append((a * b).sum((0, 2, 4)))
    return torch.cat(rows)


def _self_positions_are_cheaper(factors: GradientFactors) -> bool:
    """The same for kernels of each sample with itself."""
    t, groups, rows = factors.row_factors.shape[2:]
    cols, c = factors.col_factors.shape[4], factors.outputs
    direct = t * t * (cols * factors.col_factors.shape[1] ** 2 + rows * factors.row_factors.shape[1] ** 2) * groups
    return direct < groups * rows * cols * c * (t + c)


def _self_position_gram(factors: GradientFactors, budget: int) -> Tensor:
    """Σ_ntt' (δ_k δ'_l)(h h') for all pairs of outputs k, l, a few samples at a time."""
    t, groups = factors.row_factors.shape[2:4]
    step = max(1, budget // max(1, 3 * t * t * groups * factors.outputs**2 * factors.row_factors.element_size()))
    total = factors.row_factors.new_zeros(factors.outputs, factors.outputs)
    for i in range(0, factors.samples, step):
        part = slice(i, i + step)
        a = torch.einsum("nktgr,nlsgr->nklgts", factors.row_factors[part], factors.row_factors[part])
        b = torch.einsum("nktgc,nlsgc->nklgts", factors.col_factors[part], factors.col_factors[part])
        total += (a * b).sum((0, 3, 4, 5))
    return total


def _by_gradients(
    left: GradientFactors, right: GradientFactors, weight: Tensor | None, mode: Mode, budget: int
) -> Tensor:
    total: Tensor | None = None
    for a, b in _jacobian_blocks(left, right, weight, budget):
        part = contract(a, b, mode)
        total = part if total is None else total.add_(part)
    assert total is not None  # noqa: S101 - a layer has at least one row
    return total


def _jacobian_blocks(left: GradientFactors, right: GradientFactors, weight: Tensor | None, budget: int):  # type: ignore[no-untyped-def]
    """Gradients of a few rows of the weight at a time, kept entries only: pairs [N, C, p], [M, C, p]."""
    groups, rows = left.row_factors.shape[3:]
    cols = left.col_factors.shape[4]
    per_row = 2 * (left.samples + right.samples) * left.outputs * cols * left.row_factors.element_size()
    step = max(1, min(rows, budget // max(1, per_row)))
    for g in range(groups):
        for i in range(0, rows, step):
            part = slice(i, i + step)
            p = None if weight is None else weight[g, part].flatten()
            # Gradients of pruned entries are not formed.
            kept = None if p is None else p.nonzero()[:, 0]
            if kept is not None and len(kept) == 0:
                continue
            a = _gradients(left, g, part, kept)
            b = a if left is right else _gradients(right, g, part, kept)
            yield (a if p is None else a * p[kept]), b
    if weight is not None and not bool(weight.any()):  # at least one pair, so that there is a sum
        empty = left.row_factors.new_zeros(left.samples, left.outputs, 1)
        yield empty, right.row_factors.new_zeros(right.samples, right.outputs, 1)


def _gradients(factors: GradientFactors, group: int, rows: slice, kept: Tensor | None) -> Tensor:
    """Gradients [N, C, p] of the rows' kept entries."""
    units = factors.row_factors[:, :, :, group, rows].transpose(2, 3)
    full = (units @ factors.col_factors[:, :, :, group]).flatten(2)
    return full if kept is None or len(kept) == full.shape[2] else full[:, :, kept]
