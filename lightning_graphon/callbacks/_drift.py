"""How far the network's tangent kernel has moved, at the price of one backward pass of a few samples."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_graphon.callbacks._forecast import clusters_of, relative
from lightning_graphon.callbacks._network import Network, read_network
from lightning_graphon.callbacks._optimized import OptimizedNetwork
from lightning_graphon.callbacks._probe import take
from lightning_graphon.callbacks._traced_loss import RecordedLoss

_ROWS = 640  # of the exact kernel that is kept from the start
_SAMPLES = 32


class KernelDrift:
    """Relative change of gᵀΘg on the first samples of the probe, g the gradient of the loss in the outputs now.

    Θ at the start is kept in full, between all outputs, so that a kernel that stands still has drift 0 whatever g does.

    Args:
        network: With its probe batch.
        optimizer: Trains it.
        masks: By the names in the LightningModule.
        outputs: [N, ...] of the probe.

    Attributes:
        reference: The kernel at the start, [n·C, n·C].
    """

    def __init__(self, network: Network, optimizer: Optimizer, masks: Mapping[str, Tensor], outputs: Tensor) -> None:
        per_sample = outputs[0].numel()
        self._count = min(len(outputs), _SAMPLES, max(1, _ROWS // per_sample))
        few = read_network(network.objective, network.root, take(network.batch, self._count))
        self._optimized = OptimizedNetwork(few, optimizer, masks)
        self.reference: Tensor | None = None

    def start(self, rates: tuple[float, ...]) -> None:
        """Remember the kernel at the current weights."""
        clusters = clusters_of(self._optimized.optimizer)
        kernels = self._optimized.kernels("empirical", "", clusters, mixing=True)
        ratios = [relative(rates)[cluster[0]] for cluster in clusters]
        kernel = torch.tensordot(torch.tensor(ratios).to(kernels), kernels, 1)
        self.reference = kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)

    def since_start(self, loss: RecordedLoss, outputs: Tensor, rates: tuple[float, ...]) -> float:
        """Drift at the current weights; NaN for a gradient that moves nothing.

        Args:
            loss: Of the outputs.
            outputs: [N, ...] of the probe now.
            rates: Learning rate of each parameter group, those at the start.
        """
        assert self.reference is not None  # noqa: S101 - start() comes first
        gradient = loss.value_and_gradient(outputs)[1][: self._count]
        flat = gradient.flatten().to(self.reference)
        frozen = float(flat @ self.reference @ flat)
        return abs(self._optimized.speed(gradient, rates) / frozen - 1) if frozen > 0 else float("nan")
