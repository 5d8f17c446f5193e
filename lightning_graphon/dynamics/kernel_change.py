"""How far the network's tangent kernel has moved, at the price of one backward pass of a few samples."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.dynamics.compact_kernels import mirrored, pack_kernels, unpack_kernels
from lightning_graphon.dynamics.optimizer import OptimizerView, RateGroups
from lightning_graphon.dynamics.optimizer_kernels import OptimizerKernels
from lightning_graphon.dynamics.probed_network import ProbedNetwork

_ROWS = 128  # of the exact kernel that is kept from the start, in every checkpoint
_SAMPLES = 32


class KernelChange:
    """Relative change of gᵀΘg on the first samples of the probe, g the gradient of the loss in the outputs now.

    Θ at the start is kept in full, between all outputs: a kernel that stands still has change 0 whatever g does.

    Args:
        network: With its probe batch.
        optimizer: Trains it.
        outputs: [N, ...] of the probe.
    """

    @checked
    def __init__(self, network: ProbedNetwork, optimizer: OptimizerView, outputs: Tensor) -> None:
        self._count = min(len(outputs), _SAMPLES, max(1, _ROWS // outputs[0].numel()))
        self._rows = self._count * outputs[0].numel()
        self._kernels = OptimizerKernels(network.first(self._count), optimizer)
        self._groups: RateGroups = ()
        self._reference: Tensor | None = None  # [G, n·C, n·C]

    def start(self, groups: RateGroups) -> None:
        """Remember the kernels of the groups of one learning rate at the current weights."""
        kernels = self._kernels.kernels(groups, reduce=None)
        self._groups, self._reference = groups, mirrored(kernels.flatten(3, 4).flatten(1, 2))

    def since_start(self, gradient: Tensor, ratios: Mapping[int, float]) -> float:
        """Relative change at the current weights; NaN for a gradient that moves nothing.

        Args:
            gradient: Of the loss in the outputs of the probe now, float64 [N, ...].
            ratios: Parameter group -> its learning rate relative to the largest.

        Raises:
            RuntimeError: Nothing has been remembered yet.
        """
        if self._reference is None:
            raise RuntimeError("KernelChange.start comes first")
        few = gradient[: self._count]
        flat = few.flatten().to(self._reference)
        parts = zip(self._groups, self._reference, strict=True)
        frozen = sum(ratios[group[0]] * float(flat @ kernel @ flat) for group, kernel in parts)
        return abs(self._kernels.speed(few, ratios) / frozen - 1) if frozen > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        reference = None if self._reference is None else pack_kernels(self._reference)
        return {"groups": [list(group) for group in self._groups], "reference": reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._groups = tuple(map(tuple, state["groups"]))
        device = next(self._kernels.network.root.parameters()).device
        reference = None if state["reference"] is None else unpack_kernels(state["reference"], device)
        self._reference = (
            None if reference is None else reference[:, : self._rows, : self._rows]
        )  # older ones have more
