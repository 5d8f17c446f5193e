"""A layer's part of the tangent kernel from the two sides of its gradients, never from a stored Jacobian.

Modes: "mean" sums over outputs to [N, M], "per_output" gives [C, N, M], "full" gives [N, C, M, C], "samples" sums the
kernels of each sample with itself to [C, C]. The caller divides.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_graphon.ntk.empirical.gradient_factors import Factors
from lightning_graphon.ntk.empirical.masked_gram import row_gram

Mode: TypeAlias = Literal["mean", "per_output", "full", "samples"]


def layer_gram(left: Factors, right: Factors, weight: Tensor | None, mode: Mode, budget: int) -> Tensor:
    """Σ weight · ∂f ∂f' over one weight, in a mode.

    Args:
        left: Factors for N samples.
        right: Factors for M samples; the same object where the block is symmetric ("samples" needs that).
        weight: [groups, rows, cols] or None for ones.
        mode: Which sums; see the module.
        budget: Bytes for temporary tensors.
    """
    simple = left.units.shape[2] == 1 and left.units.shape[3] == 1 and left.inputs.shape[1] == 1
    if simple:
        return _one_position(left, right, None if weight is None else weight[0], mode, budget)
    if weight is None and mode == "samples" and _own_positions_are_cheaper(left):
        return _own_position_gram(left, budget)
    if weight is None and mode == "mean" and _positions_are_cheaper(left, right):
        return _position_gram(left, right, budget)
    return _packed(left, right, weight, mode, budget)


def contract(left: Tensor, right: Tensor, mode: Mode) -> Tensor:
    """Gram of gradients [N, C, p] and [M, C, p] in a mode."""
    if mode == "mean":
        return left.flatten(1) @ right.flatten(1).T
    if mode == "per_output":
        return left.transpose(0, 1) @ right.permute(1, 2, 0)
    if mode == "samples":
        return (left @ right.mT).sum(0)
    n, c, m = len(left), left.shape[1], len(right)
    return (left.flatten(0, 1) @ right.flatten(0, 1).T).reshape(n, c, m, c)


def squared_norm(sides: Factors, weight: Tensor | None, budget: int) -> float:
    """Trace of the layer's part over samples and outputs."""
    if sides.units.shape[2] == 1 and sides.units.shape[3] == 1 and sides.inputs.shape[1] == 1:
        g2, h2 = sides.units[:, :, 0, 0].square().sum(1), sides.inputs[:, 0, 0, 0].square()
        if weight is None:
            return float((g2.sum(1) * h2.sum(1)).sum())
        return float(((g2 @ weight[0]) * h2).sum())
    return sum(float((a * b).sum()) for a, b in _jacobian_blocks(sides, sides, weight, budget))


def _one_position(left: Factors, right: Factors, weight: Tensor | None, mode: Mode, budget: int) -> Tensor:
    """One position, one group: H [N, cols], G [N, C, rows]."""
    H, G = left.inputs[:, 0, 0, 0], left.units[:, :, 0, 0]
    if mode == "samples":
        size = H.square().sum(1, keepdim=True) if weight is None else H.square() @ weight.T
        return contract(G * size[:, None], G, mode)
    H2, G2 = (H, G) if left is right else (right.inputs[:, 0, 0, 0], right.units[:, :, 0, 0])
    if mode == "mean":
        return (H @ H2.T) * contract(G, G2, mode) if weight is None else row_gram(H, G, H2, G2, weight, budget)
    if weight is None:
        gram, base = contract(G, G2, mode), H @ H2.T
        return gram * (base[:, None, :, None] if mode == "full" else base)
    blocks = [_against_one(H, G, h, g, weight, mode) for h, g in zip(H2, G2, strict=True)]
    return torch.stack(blocks, dim=2)


def _against_one(H: Tensor, G: Tensor, h: Tensor, g: Tensor, weight: Tensor, mode: Mode) -> Tensor:
    """Kernel of all samples against one: S_ni = Σ_j P_ij H_nj h_j is shared by all pairs of outputs."""
    shared = G * ((H * h) @ weight.T)[:, None]
    return shared @ g.T if mode == "full" else torch.einsum("nkr,kr->kn", shared, g)


def _positions_are_cheaper(left: Factors, right: Factors) -> bool:
    """Compare the flops of the positions' Gram with those of forming the gradients."""
    t, groups, rows = left.units.shape[2:]
    cols, outputs = left.inputs.shape[4], left.outputs
    n, m = left.samples, right.samples
    direct = n * m * t * t * (cols * left.inputs.shape[1] + rows * left.units.shape[1]) * groups
    packed = groups * rows * cols * outputs * ((n + m) * t + n * m)
    return direct < packed


def _position_gram(left: Factors, right: Factors, budget: int) -> Tensor:
    """Σ_tt' (Σ_k δ δ')(h h') for all pairs of samples, a few left samples at a time."""
    t, groups = left.units.shape[2:4]
    per_sample = 3 * t * t * groups * right.samples * left.units.element_size()
    step = max(1, budget // max(1, per_sample))
    rows = []
    for i in range(0, left.samples, step):
        part = slice(i, i + step)
        a = torch.einsum("nktgr,mksgr->gntms", left.units[part], right.units)
        b = torch.einsum("nktgc,mksgc->gntms", left.inputs[part], right.inputs)
        rows.append((a * b).sum((0, 2, 4)))
    return torch.cat(rows)


def _own_positions_are_cheaper(sides: Factors) -> bool:
    """Likewise for the self-terms between pairs of outputs."""
    t, groups, rows = sides.units.shape[2:]
    cols, c = sides.inputs.shape[4], sides.outputs
    direct = t * t * (cols * sides.inputs.shape[1] ** 2 + rows * sides.units.shape[1] ** 2) * groups
    return direct < groups * rows * cols * c * (t + c)


def _own_position_gram(sides: Factors, budget: int) -> Tensor:
    """Σ_ntt' (δ_k δ'_l)(h h') for all pairs of outputs k, l, a few samples at a time."""
    t, groups = sides.units.shape[2:4]
    step = max(1, budget // max(1, 3 * t * t * groups * sides.outputs**2 * sides.units.element_size()))
    total = sides.units.new_zeros(sides.outputs, sides.outputs)
    for i in range(0, sides.samples, step):
        part = slice(i, i + step)
        a = torch.einsum("nktgr,nlsgr->nklgts", sides.units[part], sides.units[part])
        b = torch.einsum("nktgc,nlsgc->nklgts", sides.inputs[part], sides.inputs[part])
        total += (a * b).sum((0, 3, 4, 5))
    return total


def _packed(left: Factors, right: Factors, weight: Tensor | None, mode: Mode, budget: int) -> Tensor:
    total: Tensor | None = None
    for a, b in _jacobian_blocks(left, right, weight, budget):
        part = contract(a, b, mode)
        total = part if total is None else total.add_(part)
    assert total is not None  # noqa: S101 - a layer has at least one row
    return total


def _jacobian_blocks(left: Factors, right: Factors, weight: Tensor | None, budget: int):  # type: ignore[no-untyped-def]
    """Gradients of a few rows of the weight at a time, kept entries only: pairs [N, C, p], [M, C, p]."""
    groups, rows = left.units.shape[3:]
    cols = left.inputs.shape[4]
    per_row = 2 * (left.samples + right.samples) * left.outputs * cols * left.units.element_size()
    step = max(1, min(rows, budget // max(1, per_row)))
    for g in range(groups):
        for i in range(0, rows, step):
            part = slice(i, i + step)
            p = None if weight is None else weight[g, part].flatten()
            kept = None if p is None else p.nonzero()[:, 0]
            if kept is not None and len(kept) == 0:
                continue
            a = _gradients(left, g, part, kept)
            b = a if left is right else _gradients(right, g, part, kept)
            yield (a if p is None else a * p[kept]), b
    if weight is not None and not bool(weight.any()):
        empty = left.units.new_zeros(left.samples, left.outputs, 1)
        yield empty, right.units.new_zeros(right.samples, right.outputs, 1)


def _gradients(sides: Factors, group: int, rows: slice, kept: Tensor | None) -> Tensor:
    """Gradients [N, C, p] of the rows' kept entries."""
    units = sides.units[:, :, :, group, rows].transpose(2, 3)
    full = (units @ sides.inputs[:, :, :, group]).flatten(2)
    return full if kept is None or len(kept) == full.shape[2] else full[:, :, kept]
