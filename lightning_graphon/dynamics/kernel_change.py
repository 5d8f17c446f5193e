"""How far the network's tangent kernel has moved, at the price of one backward pass of a few samples."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_graphon._shared.affordable import largest_affordable
from lightning_graphon._shared.checks import checked
from lightning_graphon.dynamics.compact_kernels import mirrored, pack_kernels, unpack_kernels
from lightning_graphon.dynamics.optimizer import OptimizerView, RateGroups
from lightning_graphon.dynamics.optimizer_kernels import OptimizerKernels
from lightning_graphon.dynamics.probed_network import ProbedNetwork

_ROWS = 128  # of the exact kernel that is kept from the start, in every checkpoint
_SAMPLES = 32
_OUTPUTS = 64  # of a sample; more are drawn from


class KernelChange:
    """Relative change of gᵀΘg on the first samples of the probe, g the gradient of the loss in the outputs now.

    Θ at the start is kept in full, between all outputs: a kernel that stands still has change 0 whatever g does.
    Of more than 64 outputs that many are drawn at random.

    Args:
        network: With its probe batch.
        optimizer: Trains it.
        outputs: [N, ...] of the probe.
    """

    @checked
    def __init__(self, network: ProbedNetwork, optimizer: OptimizerView, outputs: Tensor) -> None:
        self._network, self._optimizer = network, optimizer
        numbers = outputs[0].numel()
        order = torch.randperm(numbers, generator=torch.Generator().manual_seed(0))
        drawn = numbers if numbers <= _OUTPUTS else _OUTPUTS
        count = min(len(outputs), _SAMPLES, max(1, _ROWS // drawn))
        # Smaller ones first, for networks on which the last would take too long.
        self._sizes = [(min(count, 4**level), order[: 4**level]) for level in range(3) if 4**level < drawn]
        self._sizes.append((count, order[:drawn].sort().values))
        self._all = numbers
        self._groups: RateGroups = ()
        self._reference: Tensor | None = None  # [G, n·C, n·C]

    def start(self, groups: RateGroups, seconds: float = math.inf) -> None:
        """Remember the kernels of the groups of one learning rate at the current weights, as many as fit."""
        reference, size = largest_affordable(
            lambda s: self._kernels(s).kernels(groups, reduce=None),
            self._sizes,
            lambda s: float((s[0] * len(s[1])) ** 2),
            seconds,
        )
        self._reference, self._groups, self._sizes = mirrored(reference.flatten(3, 4).flatten(1, 2)), groups, [size]

    def _kernels(self, size: tuple[int, Tensor]) -> OptimizerKernels:
        few = self._network.first(size[0])
        return OptimizerKernels(few if len(size[1]) == self._all else few.selected(size[1]), self._optimizer)

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
        samples, numbers = self._sizes[0]
        few = gradient[:samples]
        few = few if len(numbers) == self._all else few.flatten(1)[:, numbers.to(few.device)]
        flat = few.flatten().to(self._reference)
        parts = zip(self._groups, self._reference, strict=True)
        frozen = sum(ratios[group[0]] * float(flat @ kernel @ flat) for group, kernel in parts)
        return abs(self._kernels((samples, numbers)).speed(few, ratios) / frozen - 1) if frozen > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        sizes = [] if self._reference is None else [list(self._sizes[0])]
        reference = None if self._reference is None else pack_kernels(self._reference)
        return {"groups": [list(group) for group in self._groups], "reference": reference, "sizes": sizes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._groups = tuple(map(tuple, state["groups"]))
        device = next(self._network.root.parameters()).device
        self._reference = None if state["reference"] is None else unpack_kernels(state["reference"], device)
        self._sizes = [(n, numbers.cpu()) for n, numbers in state["sizes"]] or self._sizes
