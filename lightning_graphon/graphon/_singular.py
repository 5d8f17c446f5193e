"""Leading singular vectors of a graph between channels, without a copy of it."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_graphon.graphon._channels import ChannelGraph

_OVERSAMPLE, _LEAST_STEPS, _MOST_STEPS, _TOLERANCE = 8, 8, 100, 1e-10


def times(graph: ChannelGraph, x: Tensor) -> Tensor:
    """The graph [out, in] times x [in, k], float64."""
    return torch.cat([part @ x.to(part) for _, part in graph.chunks()])


def times_transposed(graph: ChannelGraph, y: Tensor) -> Tensor:
    """The transposed graph times y [out, k], float64."""
    out = torch.zeros(graph.shape[1], y.shape[1], dtype=torch.float64, device=graph.device)
    for span, part in graph.chunks():
        out += part.T @ y[span].to(part)
    return out


def leading_of(graph: ChannelGraph, *, rank: int, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`leading` of the graph itself."""
    return leading(
        lambda x: times(graph, x),
        lambda y: times_transposed(graph, y),
        graph.shape,
        graph.device,
        rank=rank,
        floor=floor,
    )


def leading(
    forward: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    device: torch.device,
    *,
    rank: int,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors U [m, r], values [r] and V [n, r], r <= rank, of a linear map by subspace iteration.

    The start is fixed. It ends when no value above `floor` changes by more than 1e-10 of the largest; those below,
    the noise, hardly converge and may be inaccurate.

    Args:
        forward: A x for x [n, k], float64.
        backward: Aᵀ y for y [m, k], float64.
        shape: m and n.
        device: device of the vectors.
        rank: how many are wanted; fewer where a side is shorter.
        floor: least singular value that matters.
    """
    count = min(rank + _OVERSAMPLE, *shape)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape[1], count, generator=generator, dtype=torch.float64).to(device)
    before = x.new_zeros(count)
    for step in range(_MOST_STEPS):
        y, triangle = torch.linalg.qr(forward(torch.linalg.qr(x).Q))
        values = torch.linalg.svdvals(triangle)
        change = (values - before)[:rank][values[:rank] > floor].abs()
        if step >= _LEAST_STEPS and not bool((change > _TOLERANCE * values[0]).any()):
            break
        x, before = backward(y), values
    v = torch.linalg.qr(backward(y)).Q
    u, s, w = torch.linalg.svd(forward(v), full_matrices=False)
    return u[:, :rank], s[:rank], (v @ w.T)[:, :rank]
