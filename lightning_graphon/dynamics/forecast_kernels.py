"""The best kernels for a forecast that a number of seconds allows: exact ones, or those of part of the outputs."""

import math
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from lightning_graphon._shared.affordable import kernel_work, largest_affordable
from lightning_graphon._shared.choices import Propagate
from lightning_graphon.dynamics.optimizer import RateGroups
from lightning_graphon.dynamics.optimizer_kernels import OptimizerKernels
from lightning_graphon.dynamics.output_part import OutputPart, output_positions
from lightning_graphon.dynamics.probed_network import ProbedNetwork, UnsupportedTrainingError
from lightning_graphon.dynamics.recorded_loss import RecordedLoss

_LARGEST_FULL = 2048  # rows of a kernel that tells outputs apart; 4 million numbers, multiplied at every step
_LARGEST_GRAM = 1024  # outputs that may move each other: a matrix of a million numbers
_ROWS = 1024  # samples times positions that are followed where not all can be
_SAMPLES = 256  # at most, of a pool with several positions each: more positions of fewer samples say more
_COLUMNS = 64  # coupled outputs whose kernels are averaged there


@dataclass(frozen=True)
class ForecastKernels:
    """What a forecast is made with.

    Attributes:
        kernels: [G, ...], of each group of parameter groups, between the samples of the probe and, after them, those of
            the pool; None where they have not been kept.
        grams: [G, C, C], how outputs move each other, the second factors of Kronecker products; None where the kernels
            say it themselves, or where outputs are taken to be alike.
        part: The part of the pool's outputs whose kernels they are, and of as many samples of the probe; None for all.
        velocities: [G, ...], how the momentum of each group moves these outputs; None without momentum.
    """

    kernels: Tensor | None
    grams: Tensor | None = None
    part: OutputPart | None = None
    velocities: Tensor | None = None


@dataclass(frozen=True)
class _Size:
    """Samples, positions and averaged columns; `exact` for all columns, between all outputs where it says "full".

    Samples are those of the pool, with as many of the probe beside them as there are; or those of the probe alone.
    """

    samples: int
    positions: int
    columns: int
    exact: str = ""


class AffordableKernels:
    """Computes the kernels of forecasts of one network, always of the same part of its outputs.

    Args:
        kernels: Of the network with its probe.
        pool: The network with what pushes; None: the probe does it itself.
        loss: Of the outputs of what pushes.
        outputs: [N, ...] of what pushes.
        full: Tell all outputs apart.
        horizon: Steps of a prediction that `seconds` must allow to follow.

    Raises:
        UnsupportedTrainingError: `full` is wanted, and there are too many outputs.
    """

    def __init__(
        self, kernels: OptimizerKernels, pool: ProbedNetwork | None, loss: RecordedLoss, outputs: Tensor, *,
        full: bool, horizon: float = 0,
    ) -> None:  # fmt: skip
        self._kernels, self._pool, self._horizon = kernels, pool, horizon
        self._probe = kernels.network.count
        numbers = outputs[0].numel()
        if full and self._probe * numbers > _LARGEST_FULL:
            raise UnsupportedTrainingError(
                f"outputs of shape {(self._probe, *outputs.shape[1:])} need a kernel between all "
                f"{self._probe * numbers} numbers, more than {_LARGEST_FULL}: give a smaller probe_size"
            )
        generator = torch.Generator().manual_seed(0)
        self._entries = output_positions(loss, outputs)
        self._entries = self._entries[torch.randperm(len(self._entries), generator=generator)]
        self._drawn = torch.randperm(self._entries.shape[1], generator=generator)
        self._sizes = self._all_sizes(outputs, full)
        self._loss, self._outputs = loss, outputs

    def _all_sizes(self, outputs: Tensor, full: bool) -> list["_Size"]:
        count, numbers = len(outputs), outputs[0].numel()
        positions, columns = self._entries.shape
        sizes = [_Size(min(2, count), 1, 1)]
        for level in range(1, 8):
            n = min(count, 2 * 2**level)
            p = max(1, min(positions, 2**level, _ROWS // n))
            sizes.append(_Size(n, p, min(columns, _COLUMNS, 2 ** (level - 1))))
        few = max(1, _LARGEST_FULL // numbers)
        if full or (outputs.ndim > 2 and self._probe * numbers <= _LARGEST_FULL):
            sizes += [_Size(n, 1, numbers, "full") for n in self._counts(min(count, few))]
        elif outputs.ndim <= 2:
            kind = "kronecker" if numbers <= _LARGEST_GRAM else "mean"
            sizes += [_Size(n, 1, numbers, kind) for n in self._counts(count)]
        else:
            n = min(count, max(self._probe, _SAMPLES))
            p = max(1, min(positions, _ROWS // n))
            sizes += [_Size(n, p, min(columns, k)) for k in (4, 16, _COLUMNS)]
        return list(dict.fromkeys(sizes))

    def _counts(self, most: int) -> list[int]:
        """Twice as many samples each time, from the probe's number on."""
        return [n for n in (self._probe * 2**k for k in range(20)) if n < most] + [most]

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
        if self._pool is not None and len(self._sizes) > 1 and math.isfinite(seconds):
            self._sizes = self._followable(seconds)
        found, size = largest_affordable(partial(self._of, groups), self._sizes, lambda s: self._work(s), seconds)
        self._sizes = [size]
        network = self._network(size.samples)
        velocities = OptimizerKernels(network, self._kernels.optimizer).velocities(groups)
        if velocities is not None and found.part is not None:
            rows = velocities[:, :, found.part.entries.to(velocities.device)]  # [G, N, P, V]
            velocities = rows.flatten(1, 2)
        return replace(found, velocities=velocities)

    def graphon(self, groups: RateGroups, propagate: Propagate) -> ForecastKernels:
        """The Graphon NTK of all samples.

        Raises:
            ValueError: There is none.
        """
        kernels = OptimizerKernels(self._network(len(self._outputs)), self._kernels.optimizer)
        return ForecastKernels(kernels.graphon_kernels(groups, propagate), velocities=kernels.velocities(groups))

    def _rows(self, size: _Size) -> int:
        samples = size.samples if self._pool is None else size.samples + min(size.samples, self._probe)
        return samples * size.positions

    def _work(self, size: _Size) -> float:
        rows = self._rows(size)
        return kernel_work(rows * size.columns, 1) if size.exact == "full" else kernel_work(rows, size.columns)

    def _followable(self, seconds: float) -> list["_Size"]:
        """Sizes whose products with the kernel, one a step, can be afforded over the horizon; the smallest always."""
        start = perf_counter()
        self._loss.value_and_gradient(self._outputs)
        of_loss = perf_counter() - start
        for most in range(len(self._sizes), 1, -1):
            if self._horizon * (of_loss + self._product_seconds(self._sizes[most - 1])) <= seconds:
                return self._sizes[:most]
        return self._sizes[:1]

    def _product_seconds(self, size: _Size) -> float:
        rows, columns = self._rows(size), self._entries.shape[1]
        if size.exact == "full":
            rows, columns = rows * columns, 1
        kernel = torch.ones(rows, rows, dtype=torch.float64, device=self._outputs.device)
        field = kernel.new_ones(rows, columns)
        start = perf_counter()
        float((kernel @ field)[0, 0])
        return perf_counter() - start

    def _network(self, samples: int) -> ProbedNetwork:
        """With that many samples of the pool after those of the probe."""
        network = self._kernels.network
        if self._pool is None:
            return network if samples == network.count else network.first(samples)
        few = network if samples >= self._probe else network.first(samples)
        return few.beside(self._pool if samples == self._pool.count else self._pool.first(samples))

    def _of(self, groups: RateGroups, size: _Size) -> ForecastKernels:
        network, view = self._network(size.samples), self._kernels.optimizer
        if size.exact:
            kernels = OptimizerKernels(network, view)
            # The pool's first samples stand for all of them.
            few = None if size.samples == len(self._outputs) else OutputPart(size.samples, _all_of(self._outputs))
            if size.exact == "kronecker":
                return ForecastKernels(*kernels.kronecker_kernels(groups), few)
            return ForecastKernels(kernels.kernels(groups, None if size.exact == "full" else "mean"), part=few)
        part = OutputPart(size.samples, self._entries[: size.positions])
        columns = part.entries[:, self._drawn[: size.columns]]
        if size.positions == 1:
            mean = OptimizerKernels(network.selected(columns[0]), view).kernels(groups, "mean")
            return ForecastKernels(mean, part=part)
        total: Tensor | float = 0.0
        for column in columns.T:
            total = total + OptimizerKernels(network.selected(column), view).kernels(groups, None)
        assert isinstance(total, Tensor)  # noqa: S101
        return ForecastKernels(total.flatten(3).flatten(1, 2) / size.columns, part=part)

    def state_dict(self) -> list[list[object]]:
        """Plain values: which sizes are still possible."""
        return [[s.samples, s.positions, s.columns, s.exact] for s in self._sizes]

    def load_state_dict(self, state: list[list[object]]) -> None:
        """Go on from `state_dict()`."""
        self._sizes = [_Size(*values) for values in state]  # type: ignore[arg-type]


def _all_of(outputs: Tensor) -> Tensor:
    """Places of all numbers of a sample, as one position, [1, V]."""
    return torch.arange(outputs[0].numel()).reshape(1, -1)
