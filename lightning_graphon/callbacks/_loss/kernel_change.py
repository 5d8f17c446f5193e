"""How far the network's tangent kernel has moved, at the price of one backward pass of a few samples."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_graphon.callbacks._distributed.optimizer_view import OptimizerView
from lightning_graphon.callbacks._loss.forecast import Clusters
from lightning_graphon.callbacks._loss.optimizer_kernels import OptimizerKernels
from lightning_graphon.callbacks._module.network import Network, read_network
from lightning_graphon.callbacks._module.probe import take

_ROWS = 640  # of the exact kernel that is kept from the start
_SAMPLES = 32


class KernelChange:
    """Relative change of gᵀΘg on the first samples of the probe, g the gradient of the loss in the outputs now.

    Θ at the start is kept in full, between all outputs, so that a kernel that stands still has drift 0 whatever g does.

    Args:
        network: With its probe batch.
        optimizer: Trains it.
        masks: By the names in the LightningModule.
        outputs: [N, ...] of the probe.

    Attributes:
        clusters: Parameter groups that share a learning rate.
        reference: Their kernels at the start, [G, n·C, n·C].
    """

    def __init__(
        self, network: Network, optimizer: OptimizerView, masks: Mapping[str, Tensor], outputs: Tensor
    ) -> None:
        per_sample = outputs[0].numel()
        self._count = min(len(outputs), _SAMPLES, max(1, _ROWS // per_sample))
        few = read_network(network.objective, network.root, take(network.batch, self._count))
        self._optimized = OptimizerKernels(few, optimizer, masks)
        self.clusters: Clusters = ()
        self.reference: Tensor | None = None

    def start(self, clusters: Clusters) -> None:
        """Remember the kernels of the clusters of parameter groups at the current weights."""
        kernels = self._optimized.kernels(clusters, reduce=None)
        self.clusters, self.reference = clusters, kernels.flatten(3, 4).flatten(1, 2)

    def since_start(self, gradient: Tensor, ratios: Mapping[int, float]) -> float:
        """Drift at the current weights; NaN for a gradient that moves nothing.

        Args:
            gradient: Of the loss in the outputs of the probe now, float64 [N, ...].
            ratios: Parameter group -> its learning rate relative to the largest.
        """
        assert self.reference is not None  # noqa: S101 - start() comes first
        few = gradient[: self._count]
        flat = few.flatten().to(self.reference)
        parts = zip(self.clusters, self.reference, strict=True)
        frozen = sum(ratios[cluster[0]] * float(flat @ kernel @ flat) for cluster, kernel in parts)
        return abs(self._optimized.speed(few, ratios) / frozen - 1) if frozen > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        return {"clusters": [list(cluster) for cluster in self.clusters], "reference": self.reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.clusters = tuple(map(tuple, state["clusters"]))
        reference = state["reference"]
        device = next(iter(self._optimized.network.root.parameters())).device
        self.reference = None if reference is None else reference.to(device)
