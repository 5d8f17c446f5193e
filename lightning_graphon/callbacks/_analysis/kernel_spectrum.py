"""The tangent kernel's spectrum under a network's masks: from its graphons where they suffice, else exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_graphon._shared.checks import check_choice, make_plain
from lightning_graphon._shared.choices import Propagate
from lightning_graphon.callbacks._module.network import TrainingStepNetwork, find_network
from lightning_graphon.ntk import SpectralSummary, empirical_ntk, spectral_summary


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

    Attributes:
        source: Which kernel it was, after `evaluate`.
    """

    def __init__(self, options: SpectrumOptions) -> None:
        self.options, self.source = options, ""
        self._network: TrainingStepNetwork | None = None

    def evaluate(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Mapping[str, Tensor]
    ) -> SpectralSummary:
        """Spectrum at the current weights.

        Raises:
            UnsupportedTrainingError: `training_step` has no single tensor of outputs.
            ValueError: The Graphon NTK was asked for and the network is no chain of Linear layers.
        """
        if self._network is None:
            self._network = find_network(trainer, pl_module, self.options.probe_size, self.options.probe_seed)
        self._network.masks = masks
        return spectral_summary(self._kernel(self._network), self._network.labels)

    def _kernel(self, network: TrainingStepNetwork) -> Tensor:
        if self.options.ntk != "empirical":
            try:
                kernel = network.graphon(self.options.propagate, self.options.positions)
            except ValueError:
                if self.options.ntk == "graphon":
                    raise
            else:
                self.source = f"Graphon NTK ({self.options.propagate}, float64)"
                return kernel
        kernel = network.empirical(empirical_ntk, torch.float64)
        self.source = f"empirical NTK ({str(kernel.dtype).removeprefix('torch.')})"
        return kernel


def spectrum_scalars(summary: SpectralSummary) -> dict[str, float]:
    """`ntk/...` scalars of a spectrum."""
    scalars = summary.scalars()
    scalars["energy_top5"] = scalars.pop("energy_concentration")
    scalars.pop("decay_offset")
    return {f"ntk/{name}": value for name, value in scalars.items() if torch.isfinite(torch.tensor(value))}
