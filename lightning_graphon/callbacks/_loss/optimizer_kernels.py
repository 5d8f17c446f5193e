"""Kernels and slopes of a network as its optimizer sees them: by parameter group, preconditioned, masked."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_graphon._shared.choices import Propagate, Reduce
from lightning_graphon.callbacks._distributed.optimizer_view import OptimizerView
from lightning_graphon.callbacks._loss.forecast import Clusters
from lightning_graphon.callbacks._module.kernels import empirical_kernel, graphon_kernel, working_dtype
from lightning_graphon.callbacks._module.network import Network
from lightning_graphon.ntk import empirical_ntk, kronecker_ntk

_Kernel = TypeVar("_Kernel")


class OptimizerKernels:
    """The network together with what trains it, while the weights are whole and the optimizer is read.

    Args:
        network: As `find_network` found it.
        optimizer: Trains it.
        masks: By the names in the LightningModule.
    """

    def __init__(self, network: Network, optimizer: OptimizerView, masks: Mapping[str, Tensor]) -> None:
        self.network, self.optimizer, self.masks = network, optimizer, masks

    def kernels(self, clusters: Clusters, reduce: Reduce | None) -> Tensor:
        """[G, ...]: the tangent kernel of each cluster of parameter groups at the current weights, float64.

        Args:
            clusters: Which groups.
            reduce: As in `empirical_ntk`.
        """
        return torch.stack([self._empirical(empirical_ntk, cluster, reduce=reduce) for cluster in clusters]).double()

    def kronecker_kernels(self, clusters: Clusters) -> tuple[Tensor, Tensor]:
        """[G, N, N] and [G, C, C]: the factors of each cluster's kernel, the second one with the trace of the first."""
        parts = [self._empirical(kronecker_ntk, cluster) for cluster in clusters]
        # So that those of the clusters add up in the proportion of their kernels.
        grams = [part.outputs * part.samples.trace() for part in parts]
        return torch.stack([part.samples for part in parts]).double(), torch.stack(grams).double()

    def graphon_kernels(self, clusters: Clusters, propagate: Propagate) -> Tensor:
        """[1, N, N]: the Graphon NTK, float64.

        Raises:
            ValueError: There is none: the network is no chain, or there are several clusters or P.
        """
        if len(clusters) > 1 or self.optimizer.adaptive:
            raise ValueError("the Graphon NTK knows one learning rate and no preconditioner: use kernel='empirical'")
        return graphon_kernel(self.network, self.network.own(self.masks), propagate)[None]

    def _empirical(self, compute: Callable[..., _Kernel], cluster: tuple[int, ...], **options: Any) -> _Kernel:
        own, dtype = self.network.own, working_dtype(self.network.module)
        weights = own(self._weights(cluster))
        return empirical_kernel(compute, self.network, own(self.masks), dtype, preconditioner=weights, **options)

    def _weights(self, cluster: tuple[int, ...]) -> dict[str, Tensor]:
        """The preconditioner; 0 for parameters that no group of the cluster moves; nothing where it is 1."""
        moved = set().union(*map(self.optimizer.names, cluster))
        still = {n: torch.zeros_like(p.detach()) for n, p in self._trained().items() if n not in moved}
        return {**self.optimizer.diagonal(), **still}

    def _trained(self) -> dict[str, nn.Parameter]:
        # Asked for anew each time: gathered weights are other tensors every time.
        return {n: p for n, p in self.network.root.named_parameters() if p.requires_grad}

    def speed(self, gradient: Tensor, ratios: Mapping[int, float]) -> float:
        """gᵀΘg at the current weights, Σ P M (Jᵀg)², per unit of the largest learning rate.

        Args:
            gradient: g, of the outputs' shape.
            ratios: Parameter group -> its learning rate relative to the largest.
        """
        trained = self._trained()
        with self.network.evaluated(), torch.enable_grad():
            outputs = self.network.outputs()
            slopes = torch.autograd.grad(outputs, list(trained.values()), gradient.to(outputs.dtype), allow_unused=True)
        diagonal = self.optimizer.diagonal()
        ratio_of = {name: ratio for group, ratio in ratios.items() for name in self.optimizer.names(group)}
        total = 0.0
        for name, slope in zip(trained, slopes, strict=True):
            if slope is not None and name in ratio_of:
                factors = (diagonal.get(name), self.masks.get(name))
                total += _sum_of_squares(slope, factors) * ratio_of[name]
        return total


def _sum_of_squares(slope: Tensor, factors: tuple[Tensor | None, ...]) -> float:
    square = slope.square()
    for factor in factors:
        square = square if factor is None else square * factor.to(square.device)
    return float(square.sum(dtype=torch.float64))
