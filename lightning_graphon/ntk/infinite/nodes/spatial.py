"""Linear maps S over positions, the same for each unit: k⁺ = S k Sᵀ, t⁺ = S t Sᵀ, μ⁺ = S μ."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Pairs, Windows
from lightning_graphon.ntk.infinite.setting import Setting
from lightning_graphon.tracing.steps import Spatial


class SpatialNode(Node):
    """Average pooling, means over positions."""

    step: Spatial

    def build(self, setting: Setting) -> None:
        """Windows of the positions."""
        self.windows = Windows.from_matrix(self.step.weights.to("cpu", torch.float64))
        self.places = [self.windows]

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """Sums over pairs of the windows."""
        (z,) = inputs
        matrix = self.windows.matrix(pairs, z.pairs, z.k)
        k, t = (None if f is None else (matrix @ f.flatten(1)).unflatten(1, f.shape[1:]) for f in (z.k, z.t))
        assert k is not None  # noqa: S101
        return k, t

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """Sums over the windows."""
        (z,) = inputs
        return None if z.mean is None else torch.einsum("op,pkn->okn", self.step.weights.to(x), z.mean)
