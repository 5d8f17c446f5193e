"""Leading singular vectors of a graph between channels, without a copy of it."""

import torch
from torch import Tensor

from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph

_OVERSAMPLE, _LEAST_STEPS, _MOST_STEPS, _TOLERANCE = 8, 8, 100, 1e-10
_LONGEST_SQUARE = 2048


def times(graph: ChannelGraph, x: Tensor) -> Tensor:
    """The graph [out, in] times x [in, k], float64."""
    return torch.cat([part @ x.to(part) for _, part in graph.chunks()])


def times_transposed(graph: ChannelGraph, y: Tensor) -> Tensor:
    """The transposed graph times y [out, k], float64."""
    out = torch.zeros(graph.shape[1], y.shape[1], dtype=torch.float64, device=graph.device)
    for span, part in graph.chunks():
        out += part.T @ y[span].to(part)
    return out


def leading(graph: ChannelGraph, *, rank: int, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors U [m, r], values [r] and V [n, r], r <= rank, of a graph [m, n] by subspace iteration.

    The start is fixed. It ends when every value above `floor` and its vectors satisfy Aᵀ u = s v to 1e-10 of the
    largest value; those below, the noise, hardly converge and may be inaccurate.

    Args:
        graph: The graph.
        rank: How many are wanted; fewer where a side is shorter.
        floor: Least singular value that matters.
    """
    count = min(rank + _OVERSAMPLE, *graph.shape)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(graph.shape[1], count, generator=generator, dtype=torch.float64).to(graph.device)
    for step in range(_MOST_STEPS):
        right = torch.linalg.qr(x).Q
        left, triangle = torch.linalg.qr(times(graph, right))
        u, s, v = torch.linalg.svd(triangle)
        u, v = left @ u, right @ v.T
        x = times_transposed(graph, u)
        residual = (x - v * s)[:, :rank].norm(dim=0)
        if step >= _LEAST_STEPS and not bool((residual[s[:rank] > floor] > _TOLERANCE * s[0]).any()):
            break
    return u[:, :rank], s[:rank], v[:, :rank]


def leading_exact(graph: ChannelGraph, *, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same, to rounding, also of values that are close to others, as those of noise are.

    From the eigenvectors of A Aᵀ or Aᵀ A, whichever is smaller; by iteration where both sides are longer than 2048.
    """
    if min(graph.shape) > _LONGEST_SQUARE:
        return leading(graph, rank=rank)
    wide = graph.shape[0] <= graph.shape[1]
    eye = torch.eye(min(graph.shape), dtype=torch.float64, device=graph.device)
    square = times(graph, times_transposed(graph, eye)) if wide else times_transposed(graph, times(graph, eye))
    short = torch.linalg.eigh(square).eigenvectors.flip(1)[:, :rank]
    long, triangle = torch.linalg.qr(times_transposed(graph, short) if wide else times(graph, short))
    scale = triangle.diagonal()
    long = torch.where(scale < 0, -long, long)
    return (short, scale.abs(), long) if wide else (long, scale.abs(), short)
