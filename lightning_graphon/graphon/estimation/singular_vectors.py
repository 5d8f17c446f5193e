"""Leading singular vectors of a channel graph, without a copy of it."""

import torch
from torch import Tensor

from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph

# Of the subspace iteration: a few vectors more than are wanted make it converge faster (Halko, Martinsson, Tropp 2011).
_OVERSAMPLING, _MIN_STEPS, _MAX_STEPS, _TOLERANCE = 8, 8, 100, 1e-10
_LARGEST_GRAM = 2048  # side of a matrix A Aᵀ that is decomposed in full


def matmul(graph: ChannelGraph, x: Tensor) -> Tensor:
    """The graph [out, in] times x [in, k], float64."""
    return torch.cat([part @ x.to(part) for _, part in graph.chunks()])


def matmul_transposed(graph: ChannelGraph, y: Tensor) -> Tensor:
    """The transposed graph times y [out, k], float64."""
    out = torch.zeros(graph.shape[1], y.shape[1], dtype=torch.float64, device=graph.device)
    for span, part in graph.chunks():
        out += part.T @ y[span].to(part)
    return out


def leading_singular_vectors(graph: ChannelGraph, *, rank: int, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors U [m, r], values [r] and V [n, r], r <= rank, of a graph [m, n] by subspace iteration.

    It ends when every value above `floor` and its vectors satisfy Aᵀ u = s v to 1e-10 of the largest value. Smaller
    values are noise that converges slowly; they may be inaccurate.
    """
    count = min(rank + _OVERSAMPLING, *graph.shape)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(graph.shape[1], count, generator=generator, dtype=torch.float64).to(graph.device)
    for step in range(_MAX_STEPS):
        right = torch.linalg.qr(x).Q
        left, triangle = torch.linalg.qr(matmul(graph, right))
        u, s, v = torch.linalg.svd(triangle)
        u, v = left @ u, right @ v.T
        x = matmul_transposed(graph, u)
        residual = (x - v * s)[:, :rank].norm(dim=0)
        if step >= _MIN_STEPS and not bool((residual[s[:rank] > floor] > _TOLERANCE * s[0]).any()):
            break
    return u[:, :rank], s[:rank], v[:, :rank]


def exact_singular_vectors(graph: ChannelGraph, *, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same to rounding, also where values are close to each other, as those of noise are.

    From the eigenvectors of A Aᵀ or Aᵀ A, whichever is smaller; by iteration where both sides are longer than 2048.
    """
    if min(graph.shape) > _LARGEST_GRAM:
        return leading_singular_vectors(graph, rank=rank)
    wide = graph.shape[0] <= graph.shape[1]
    eye = torch.eye(min(graph.shape), dtype=torch.float64, device=graph.device)
    gram = matmul(graph, matmul_transposed(graph, eye)) if wide else matmul_transposed(graph, matmul(graph, eye))
    short = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    # The other side's vectors are A short / s; QR normalises them and keeps them orthogonal where s is tiny.
    long, triangle = torch.linalg.qr(matmul_transposed(graph, short) if wide else matmul(graph, short))
    scale = triangle.diagonal()
    long = torch.where(scale < 0, -long, long)
    return (short, scale.abs(), long) if wide else (long, scale.abs(), short)
