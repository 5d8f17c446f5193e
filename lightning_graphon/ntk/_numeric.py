"""Small numerical helpers shared by the kernels: square roots with finite gradients, quadrature nodes."""

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def safe_sqrt(t: Tensor) -> Tensor:
    """Square root with gradient 0 where `t <= 0`, where the plain one has NaN or an infinite gradient.

    Arguments of the kernels' square roots are non-negative in exact arithmetic, so the only negative values
    are rounding; they give 0.

    Args:
        t: any shape, floating point.

    Returns:
        Same shape and dtype.

    >>> t = torch.tensor([4.0, 0.0], requires_grad=True)
    >>> safe_sqrt(t).sum().backward()
    >>> t.grad
    tensor([0.2500, 0.0000])
    """
    if not (t.requires_grad and torch.is_grad_enabled()):
        return t.clamp_min(0).sqrt_()
    positive = t > 0
    return torch.where(positive, torch.where(positive, t, 1.0).sqrt(), 0.0)


@lru_cache(maxsize=32)
def legendre_nodes(edges: tuple[float, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Composite Gauss-Legendre rule on the panels between `edges`, `count` nodes a panel.

    Returns:
        Nodes and weights, float64, each of length `count * (len(edges) - 1)`.
    """
    x, w = np.polynomial.legendre.leggauss(count)
    panels = list(pairwise(edges))
    nodes = [(b - a) / 2 * x + (a + b) / 2 for a, b in panels]
    weights = [(b - a) / 2 * w for a, b in panels]
    return np.concatenate(nodes), np.concatenate(weights)


def determinant(qx: Tensor, qy: Tensor, k: Tensor) -> Tensor:
    """qx qy - k² of a covariance; exactly 0 for equal rows, however large."""
    root = safe_sqrt(qx * qy)
    return (root - k) * (root + k)
