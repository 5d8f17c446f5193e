"""The tangent kernel's spectrum under a network's masks: from its graphons where they suffice, else exactly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import get_args

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_graphon._shared.affordable import kernel_work, largest_affordable
from lightning_graphon._shared.checks import check_choice, make_plain
from lightning_graphon._shared.choices import Propagate
from lightning_graphon.callbacks._analysis.affordable_network import PORTION, affordable_network
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._module.network import TrainingStepNetwork
from lightning_graphon.callbacks._module.pool import draw_probe
from lightning_graphon.callbacks._module.training_step import TrainingStepObjective
from lightning_graphon.dynamics import UnsupportedTrainingError
from lightning_graphon.ntk import SpectralSummary, empirical_ntk, expected_error, spectral_summary


@dataclass(frozen=True)
class SpectrumOptions:
    """Which kernel's spectrum `GraphonMonitor` shows, on which samples, and when.

    Args:
        ntk: "graphon", "empirical", or "auto": the Graphon NTK where the network is a chain of Linear layers, else the
            exact kernel.
        propagate: "energy" (from the weights), "density" (arXiv:2510.17515) or "drift", for the Graphon NTK.
        bins: Positions of a hidden layer for the Graphon NTK, at most. None: 9 (3 x 3 quantiles of degrees), or 8 for
            "drift", whose cells need many weights. Against 64 that changes the kernel by 2 % (3.4 % at most: all
            methods, 4x256 on digits before and after training, 4x1024 on MNIST), its distance from the network's own
            kernel by less than 0.02, and takes a third of the time.
        probe_size: Samples in the probe batch.
        probe_seed: Seed of the probe batch.
        every_n_epochs: Look at the start of every n-th epoch, too, not at the start and the end of training alone;
            0: never.

    Raises:
        ValueError: An argument has a value that is not allowed.
    """

    ntk: str = "auto"
    propagate: Propagate = "energy"
    bins: int | None = None
    probe_size: int = 128
    probe_seed: int = 0
    every_n_epochs: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        check_choice("ntk", self.ntk, ("auto", "graphon", "empirical"))
        check_choice("propagate", self.propagate, get_args(Propagate))
        for name in ("bins", "probe_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if self.every_n_epochs < 0:
            raise ValueError(f"every_n_epochs must be 0 or more, got {self.every_n_epochs!r}")

    @property
    def positions(self) -> int:
        """Positions of a hidden layer, at most."""
        return self.bins or (8 if self.propagate == "drift" else 9)


class KernelSpectrum:
    """Spectrum of the tangent kernel on a probe batch that is drawn once.

    Args:
        options: Which kernel, on which samples.
        budget: Says how long it may take. Where that is too short for all samples and outputs, some are drawn at
            random, the same ones at every look.

    Attributes:
        source: Which kernel it was, after `evaluate`, and of what.
        caution: How far the kernel of one network may be from that limit; "" where it is no limit.
    """

    def __init__(self, options: SpectrumOptions, budget: TimeBudget) -> None:
        self.options, self.source, self.caution = options, "", ""
        self._budget = budget
        self._network: TrainingStepNetwork | None = None
        self._sizes: list[tuple[int, int]] = []  # samples and outputs
        self._counts: list[int] = []  # samples of the Graphon NTK
        self._order: Tensor  # in which outputs are drawn; known with the sizes
        self._took = 0.0

    def evaluate(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Mapping[str, Tensor]
    ) -> SpectralSummary:
        """Spectrum at the current weights.

        Raises:
            UnsupportedTrainingError: `training_step` has no single tensor of outputs, or there is no time.
            ValueError: The Graphon NTK was asked for and the network is no chain of Linear layers.
        """
        if self._took >= self._budget.left:
            took = f", and the last one took {self._took:.2g} s" if self._took else ""
            raise UnsupportedTrainingError(f"time_budget leaves {self._budget.left:.2g} s{took}")
        if self._network is None:
            batch = draw_probe(trainer, pl_module, self.options.probe_size, self.options.probe_seed)
            objective = TrainingStepObjective(trainer, pl_module, alone=True)
            self._network = affordable_network(trainer, objective, batch, masks, self._budget)[0]
        network = self._network
        network.masks = masks
        kernel, self.caution = None, ""
        if self.options.ntk != "empirical":
            try:
                kernel = self._graphon(network)
                self.source = f"Graphon NTK ({self.options.propagate}, float64) on {len(kernel)} samples"
                self.caution = _caution(masks)
            except ValueError:
                if self.options.ntk == "graphon":
                    raise
        if kernel is None:
            kernel = self._empirical(network)
        self._budget.reserved = self._took  # the spectrum of the end is the one to compare it with
        return spectral_summary(kernel, None if network.labels is None else network.labels[: len(kernel)])

    def _timed(self, compute: Callable[[], Tensor]) -> Tensor:
        """A kernel, and what it will take again; not the search for a size that fits."""
        start = perf_counter()
        kernel = compute()
        self._took = perf_counter() - start
        return kernel

    def _graphon(self, network: TrainingStepNetwork) -> Tensor:
        """The Graphon NTK [n, n] of as many samples as time allows."""
        count = len(network.inputs[0] if isinstance(network.inputs, tuple) else network.inputs)
        self._counts = self._counts or list(dict.fromkeys(min(count, n) for n in (2, 8, 32, count)))

        def run(n: int) -> Tensor:
            part = network if n == count else network.first(n)
            return self._timed(lambda: part.graphon(self.options.propagate, self.options.positions))

        budget = self._budget.portion(PORTION)
        kernel, size = largest_affordable(run, self._counts, lambda n: float(n * n), budget)
        self._counts = [size]
        return kernel

    def _empirical(self, network: TrainingStepNetwork) -> Tensor:
        """Mean kernel over outputs [n, n], over all outputs where time allows."""
        count = len(network.inputs[0] if isinstance(network.inputs, tuple) else network.inputs)
        if not self._sizes:
            with network.evaluated(), torch.no_grad():
                outputs = network.first(1).outputs()[0].numel()
            self._order = torch.randperm(outputs, generator=torch.Generator().manual_seed(self.options.probe_seed))
            sizes = [(min(count, 2 * 2**level), min(outputs, 2**level)) for level in range(7)]
            sizes += [(count, min(outputs, k)) for k in (64, 256, outputs)]
            self._sizes = list(dict.fromkeys(sizes))
        outputs = len(self._order)

        def run(size: tuple[int, int]) -> Tensor:
            part = network if size[0] == count else network.first(size[0])
            part = part if size[1] == outputs else part.selected(self._order[: size[1]])
            return self._timed(lambda: part.empirical(empirical_ntk, torch.float64))

        kernel, size = largest_affordable(run, self._sizes, lambda s: kernel_work(*s), self._budget.portion(PORTION))
        self._sizes = [size]
        drawn = "" if size[1] == outputs else f" and {size[1]} of {outputs} outputs"
        kind = str(kernel.dtype).removeprefix("torch.")
        self.source = f"empirical NTK ({kind}) on {size[0]} samples{drawn}"
        return kernel


def _caution(masks: Mapping[str, Tensor]) -> str:
    """One sentence on the network's distance from its limit."""
    found = expected_error(masks)
    if found is None:
        return ""
    return (
        f"its limit at infinite width: expect the kernel of this one network to differ from it by about "
        f"{100 * found.error:.0f} % (fewest units in {found.layer}: {found.units:.0f} effective, "
        f"{found.fan_in:.0f} kept inputs each)"
    )


def spectrum_scalars(summary: SpectralSummary) -> dict[str, float]:
    """`ntk/...` scalars of a spectrum."""
    scalars = summary.scalars()
    scalars["energy_top5"] = scalars.pop("energy_concentration")
    scalars.pop("decay_offset")
    return {f"ntk/{name}": value for name, value in scalars.items() if torch.isfinite(torch.tensor(value))}
