"""The best kernels for a forecast that a number of seconds allows: exact ones, or those of part of the outputs."""

import math
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from lightning_graphon._shared.affordable import kernel_work, largest_affordable
from lightning_graphon.dynamics.optimizer import RateGroups
from lightning_graphon.dynamics.optimizer_kernels import OptimizerKernels
from lightning_graphon.dynamics.output_part import OutputPart, output_positions
from lightning_graphon.dynamics.probed_network import UnsupportedTrainingError
from lightning_graphon.dynamics.recorded_loss import RecordedLoss

_LARGEST_FULL = 2048  # rows of a kernel that tells outputs apart; 4 million numbers, multiplied at every step
_LARGEST_GRAM = 1024  # outputs that may move each other: a matrix of a million numbers
_ROWS = 1024  # samples times positions that are followed where not all can be
_COLUMNS = 64  # coupled outputs whose kernels are averaged there


@dataclass(frozen=True)
class ForecastKernels:
    """What a forecast is made with.

    Attributes:
        kernels: [G, ...], of each group of parameter groups.
        grams: [G, C, C] or None, as in `Forecast`.
        part: The part of the outputs whose kernels they are; None for all.
    """

    kernels: Tensor
    grams: Tensor | None = None
    part: OutputPart | None = None


@dataclass(frozen=True)
class _Size:
    """Samples, positions and averaged columns; `exact` for all of them, between all outputs where it says "full"."""

    samples: int
    positions: int
    columns: int
    exact: str = ""

    @property
    def work(self) -> float:
        rows, columns = self.samples * self.positions, self.columns
        if self.exact == "full":
            rows, columns = rows * columns, 1
        return kernel_work(rows, columns)


class AffordableKernels:
    """Computes the kernels of forecasts of one network, always of the same part of its outputs.

    Args:
        kernels: Of the network.
        loss: Of its outputs.
        outputs: [N, ...].
        full: Tell all outputs apart.

    Raises:
        UnsupportedTrainingError: `full` is wanted, and there are too many outputs.
    """

    def __init__(self, kernels: OptimizerKernels, loss: RecordedLoss, outputs: Tensor, full: bool) -> None:
        self._kernels = kernels
        count, numbers = len(outputs), outputs[0].numel()
        if full and outputs.numel() > _LARGEST_FULL:
            raise UnsupportedTrainingError(
                f"outputs of shape {tuple(outputs.shape)} need a kernel between all {outputs.numel()} numbers, more "
                f"than {_LARGEST_FULL}: give a smaller probe_size"
            )
        generator = torch.Generator().manual_seed(0)
        self._entries = output_positions(loss, outputs)
        positions, columns = self._entries.shape
        self._entries = self._entries[torch.randperm(positions, generator=generator)]
        self._drawn = torch.randperm(columns, generator=generator)
        self._sizes = [_Size(min(2, count), 1, 1)]
        for level in range(1, 8):
            n = min(count, 2 * 2**level)
            p = max(1, min(positions, 2**level, _ROWS // n))
            self._sizes.append(_Size(n, p, min(columns, _COLUMNS, 2 ** (level - 1))))
        if full or (outputs.ndim > 2 and outputs.numel() <= _LARGEST_FULL):
            self._sizes.append(_Size(count, 1, numbers, "full"))
        elif outputs.ndim <= 2:
            self._sizes.append(_Size(count, 1, numbers, "kronecker" if numbers <= _LARGEST_GRAM else "mean"))
        else:
            p = max(1, min(positions, _ROWS // count))
            self._sizes += [_Size(count, p, min(columns, k)) for k in (4, 16, _COLUMNS)]
        self._sizes = list(dict.fromkeys(self._sizes))

    def compute(self, groups: RateGroups, seconds: float) -> ForecastKernels:
        """Kernels at the current weights; from the second time on of the size of the first, whatever it takes.

        Raises:
            UnsupportedTrainingError: There are so many groups that even the smallest kernels take longer.
        """
        if len(groups) > 1 and len(self._sizes) > 1 and math.isfinite(seconds):
            start = perf_counter()
            self._of(groups[:1], self._sizes[0])
            if (took := len(groups) * (perf_counter() - start)) > seconds:
                raise UnsupportedTrainingError(
                    f"kernels for each of {len(groups)} learning rates take {took:.2g} s, and time_budget leaves "
                    f"{seconds:.2g} s"
                )
        found, size = largest_affordable(partial(self._of, groups), self._sizes, lambda s: s.work, seconds)
        self._sizes = [size]
        return found

    def _of(self, groups: RateGroups, size: _Size) -> ForecastKernels:
        if size.exact == "kronecker":
            return ForecastKernels(*self._kernels.kronecker_kernels(groups))
        if size.exact:
            return ForecastKernels(self._kernels.kernels(groups, None if size.exact == "full" else "mean"))
        part = OutputPart(size.samples, self._entries[: size.positions])
        columns = part.entries[:, self._drawn[: size.columns]]
        first, view = self._kernels.network.first(size.samples), self._kernels.optimizer
        if size.positions == 1:
            mean = OptimizerKernels(first.selected(columns[0]), view).kernels(groups, "mean")
            return ForecastKernels(mean, part=part)
        total: Tensor | float = 0.0
        for column in columns.T:
            total = total + OptimizerKernels(first.selected(column), view).kernels(groups, None)
        assert isinstance(total, Tensor)  # noqa: S101
        return ForecastKernels(total.flatten(3).flatten(1, 2) / size.columns, part=part)

    def state_dict(self) -> list[list[object]]:
        """Plain values: which sizes are still possible."""
        return [[s.samples, s.positions, s.columns, s.exact] for s in self._sizes]

    def load_state_dict(self, state: list[list[object]]) -> None:
        """Go on from `state_dict()`."""
        self._sizes = [_Size(*values) for values in state]  # type: ignore[arg-type]
