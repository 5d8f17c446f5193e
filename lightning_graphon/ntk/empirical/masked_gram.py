r"""The masked layer's kernel, traced over outputs, without a Jacobian: the row-Gram algorithm.

.. math::
    \sum_{ij} P_{ij} (\sum_k δ_{ki} δ'_{ki}) h_j h'_j = \sum_i [H_i P_i H_i'^⊤] ⊙ [\sum_k G_{ki} G_{ki}'^⊤],

where H_i keeps only the inputs of unit i: N² (nnz + K n_out) multiplications instead of N² K nnz. Units are sorted by
degree and padded in blocks, so that every step is one batched matrix product.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Units per block and samples along a tile's edge: on a CPU what its cache holds, elsewhere what fills the device.
_CPU_BLOCK, _DEVICE_BLOCK = (32, 128), (128, 512)


@dataclass
class _Buffers:
    """Memory that every block reuses."""

    left: Tensor
    right: Tensor
    gram: Tensor
    signal: Tensor


def row_gram(H: Tensor, G: Tensor, H2: Tensor, G2: Tensor, weight: Tensor, budget: int = 1 << 28) -> Tensor:
    """Σ_ij P_ij (Σ_k G_ni G'_mi) H_nj H'_mj for all pairs n, m: [N, M].

    Args:
        H: Inputs [N, cols].
        G: Signals [N, K, rows].
        H2: Inputs [M, cols]; the same object as H where the result is symmetric.
        G2: Signals [M, K, rows].
        weight: Weights P [rows, cols]; zeros cost nothing.
        budget: Bytes for blocks on a device that is not a CPU.

    >>> H, G, P = torch.ones(2, 3), torch.ones(2, 1, 2), torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    >>> row_gram(H, G, H, G, P)
    tensor([[3., 3.],
            [3., 3.]])
    """
    kept = weight != 0
    binary = bool(torch.equal(weight, kept.to(weight)))
    # Where more than half are kept: the dense product, less that of the complement.
    complement = binary and 2 * int(torch.count_nonzero(kept)) > kept.numel()
    kept = ~kept if complement else kept
    out = H.new_zeros(len(H), len(H2))
    rows, cols = kept.nonzero(as_tuple=True)
    degree = torch.bincount(rows, minlength=len(kept))
    order = torch.argsort(degree, descending=True, stable=True)[: int((degree > 0).sum())]
    symmetric = H is H2 and G is G2
    # Rows of different degree are padded with the index of a row of zeros.
    columns = _columns(rows, cols, degree, kept.shape[1])
    left = _padded_transpose(H)
    right = left if symmetric else _padded_transpose(H2)
    signals = G.permute(2, 0, 1).contiguous()
    signals2 = signals if symmetric else G2.permute(2, 0, 1).contiguous()
    padded = None if binary else torch.cat([weight, weight.new_zeros(len(weight), 1)], 1)
    buffers = _Buffers(*(H.new_empty(0) for _ in range(4)))
    widths = degree[order].tolist() or [0]  # descending, so the first unit of a block is its widest
    step, edge = (
        _CPU_BLOCK if H.device.type == "cpu" else _blocking(len(H) + len(H2), widths[0], H.element_size(), budget)
    )
    for start in range(0, len(order), step):
        units = order[start : start + step]
        index = columns[units, : widths[start]]
        scale = None if padded is None else padded[units[:, None], index]
        _block(out, left, right, signals[units], signals2[units], index, scale, symmetric, buffers, edge)
    if symmetric:
        out = torch.tril(out) + torch.tril(out, -1).T
    return (H @ H2.T) * (G.flatten(1) @ G2.flatten(1).T) - out if complement else out


def _blocking(samples: int, width: int, itemsize: int, budget: int) -> tuple[int, int]:
    """Units and edge whose gathered inputs and two tiles fit `budget` bytes."""
    units, edge = _DEVICE_BLOCK
    while units > 1 and units * itemsize * (width * samples + 2 * edge**2) > budget:
        units //= 2
    return units, edge


def _columns(rows: Tensor, cols: Tensor, degree: Tensor, padding: int) -> Tensor:
    """Kept columns of each row, filled up with `padding`: [number of rows, largest degree]."""
    start = torch.cumsum(degree, 0) - degree
    place = torch.arange(len(rows), device=rows.device) - start[rows]
    out = torch.full((len(degree), int(degree.max())), padding, device=rows.device)
    out[rows, place] = cols
    return out


def _padded_transpose(H: Tensor) -> Tensor:
    """Hᵀ with a row of zeros below, for padding: [cols + 1, N]."""
    out = H.new_zeros(H.shape[1] + 1, len(H))
    out[:-1] = H.T
    return out


def _block(
    out: Tensor, left: Tensor, right: Tensor, G: Tensor, G2: Tensor, index: Tensor, scale: Tensor | None,
    symmetric: bool, buffers: _Buffers, edge: int,
) -> None:  # fmt: skip
    """Add one block of units to `out`, tile by tile; the upper triangle is skipped when symmetric."""
    A = _gather(left, index, buffers, "left")
    B = A if symmetric else _gather(right, index, buffers, "right")
    W = B if scale is None else B * scale[:, :, None]
    for i in range(0, out.shape[0], edge):
        # Two batched products per tile: the masked inputs and the signals of each unit.
        a, g = A[:, :, i : i + edge].mT, G[:, i : i + edge]
        for j in range(0, min(i + 1, out.shape[1]) if symmetric else out.shape[1], edge):
            b, g2 = W[:, :, j : j + edge], G2[:, j : j + edge].mT
            shape = (len(index), a.shape[1], b.shape[2])
            gram = torch.bmm(a, b, out=_view(buffers, "gram", shape))
            signal = torch.bmm(g, g2, out=_view(buffers, "signal", shape))
            out[i : i + edge, j : j + edge] += gram.mul_(signal).sum(0)


def _gather(source: Tensor, index: Tensor, buffers: _Buffers, name: str) -> Tensor:
    """Rows of `source` by `index` [units, width]: [units, width, N]."""
    flat = _view(buffers, name, (index.numel(), source.shape[1]), source)
    torch.index_select(source, 0, index.reshape(-1), out=flat)
    return flat.reshape(*index.shape, source.shape[1])


def _view(buffers: _Buffers, name: str, shape: tuple[int, ...], like: Tensor | None = None) -> Tensor:
    """A contiguous view of a buffer, which grows when needed."""
    size = math.prod(shape)
    if getattr(buffers, name).numel() < size:
        setattr(buffers, name, getattr(buffers, name).new_empty(size))
    return getattr(buffers, name)[:size].view(shape)
