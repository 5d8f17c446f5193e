"""Kernels and slopes of a network as its optimizer sees them: by parameter group, preconditioned, masked."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_graphon._shared.choices import Propagate
from lightning_graphon.dynamics.optimizer import OptimizerView, RateGroups
from lightning_graphon.dynamics.probed_network import ProbedNetwork
from lightning_graphon.ntk import EmpiricalNTK, empirical_ntk, kronecker_ntk

_PASS = 256  # samples at a time


class OptimizerKernels:
    """A probed network together with what trains it, while the weights are whole and the optimizer is read.

    Args:
        network: With its probe batch.
        optimizer: Trains it.
    """

    def __init__(self, network: ProbedNetwork, optimizer: OptimizerView) -> None:
        self.network, self.optimizer = network, optimizer

    def kernels(self, groups: RateGroups, reduce: str | None) -> Tensor:
        """Tangent kernels [G, ...] of the groups at the current weights, float64.

        Args:
            groups: Parameter groups that share a learning rate, kernel by kernel.
            reduce: As in `empirical_ntk`.
        """
        diagonals = map(self._preconditioner, groups)
        kernels = [self.network.empirical(empirical_ntk, preconditioner=d, reduce=reduce) for d in diagonals]
        return torch.stack(kernels).double()

    def kronecker_kernels(self, groups: RateGroups) -> tuple[Tensor, Tensor]:
        """[G, N, N] and [G, C, C]: the factors of each group's kernel, the second one with the trace of the first."""
        diagonals = map(self._preconditioner, groups)
        parts = [self.network.empirical(kronecker_ntk, preconditioner=d) for d in diagonals]
        # So that those of the groups add up in the proportion of their kernels.
        grams = [part.outputs * part.samples.trace() for part in parts]
        return torch.stack([part.samples for part in parts]).double(), torch.stack(grams).double()

    def velocities(self, groups: RateGroups) -> Tensor | None:
        """[G, N, C]: how each group's momentum moves the outputs, per unit of learning rate; None without momentum."""
        directions = self.optimizer.velocity()
        if not directions:
            return None
        moved = [set().union(*map(self.optimizer.names, group)) for group in groups]
        inside = [self.network.inside({n: directions[n] for n in names & directions.keys()}) for names in moved]
        try:
            return torch.stack([self.network.empirical(_jvp, direction=d) for d in inside]).double()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no derivatives in forward mode, as of reentrant checkpoints: predictions begin at rest
            return None

    def graphon_kernels(self, groups: RateGroups, propagate: Propagate) -> Tensor:
        """[1, N, N]: the Graphon NTK, float64.

        Raises:
            ValueError: There is none: the network is no chain, or there are several groups or a preconditioner.
        """
        if len(groups) > 1 or self.optimizer.adaptive:
            raise ValueError("the Graphon NTK knows one learning rate and no preconditioner: use ntk='empirical'")
        return self.network.graphon(propagate)[None]

    def _preconditioner(self, group: tuple[int, ...]) -> dict[str, Tensor]:
        """The optimizer's diagonal inside the network; 0 for what the group does not move, nothing where it is 1."""
        moved = set().union(*map(self.optimizer.names, group))
        still = {n: torch.zeros_like(p.detach()) for n, p in self._trained().items() if n not in moved}
        return self.network.inside({**self.optimizer.diagonal(), **still})

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
        diagonal, masks = self.optimizer.diagonal(), self.network.masks
        ratio_of = {name: ratio for group, ratio in ratios.items() for name in self.optimizer.names(group)}
        total = 0.0
        for name, slope in zip(trained, slopes, strict=True):
            if slope is not None and name in ratio_of:
                square = slope.square()
                for factor in (factors[name] for factors in (diagonal, masks) if name in factors):
                    square = square * factor.to(square.device)
                total += float(square.sum(dtype=torch.float64)) * ratio_of[name]
        return total


def _jvp(
    module: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    masks: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> Tensor:
    return EmpiricalNTK(module, inputs, masks=masks, batch=_PASS).jvp(direction)
