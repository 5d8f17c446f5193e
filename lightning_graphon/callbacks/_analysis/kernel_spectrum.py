"""The tangent kernel of a network under its masks: from its graphons where they suffice, else exactly."""

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_graphon._shared.choices import Propagate
from lightning_graphon.callbacks._module.kernels import empirical_kernel, graphon_kernel
from lightning_graphon.callbacks._module.network import Network, find_network
from lightning_graphon.ntk import SpectralSummary, empirical_ntk, spectral_summary

KERNELS = ("auto", "graphon", "empirical")


class KernelSpectrum:
    """Spectrum of the tangent kernel on a probe batch that is drawn once.

    Args:
        kernel: "graphon", "empirical", or "auto": graphon where the network is a chain of Linear layers.
        propagate: "energy", "density" or "drift", for the Graphon NTK.
        size: Samples in the probe batch.
        seed: Seed of the probe batch.
        bins: Positions of a hidden layer, for the Graphon NTK.
    """

    def __init__(self, kernel: str, propagate: Propagate, size: int, seed: int, bins: int) -> None:
        self.kernel, self.propagate, self.size, self.seed, self.bins = kernel, propagate, size, seed, bins
        self.source = ""
        self._network: Network | None = None

    def evaluate(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Mapping[str, Tensor]
    ) -> SpectralSummary:
        """Spectrum at the current weights; `source` then says which kernel it is.

        Raises:
            UnreadableStepError: `training_step` has no single tensor of outputs.
            ValueError: The Graphon NTK was asked for and the network is no chain of Linear layers.
        """
        if self._network is None:
            self._network = find_network(trainer, pl_module, self.size, self.seed)
        return spectral_summary(self._kernel(self._network, self._network.own(masks)), self._network.labels)

    def _kernel(self, network: Network, masks: dict[str, Tensor]) -> Tensor:
        if self.kernel != "empirical":
            try:
                kernel = graphon_kernel(network, masks, self.propagate, self.bins)
            except ValueError:
                if self.kernel == "graphon":
                    raise
            else:
                self.source = f"Graphon NTK ({self.propagate}, float64)"
                return kernel
        kernel = empirical_kernel(empirical_ntk, network, masks, torch.float64)
        self.source = f"empirical NTK ({str(kernel.dtype).removeprefix('torch.')})"
        return kernel


def spectrum_scalars(summary: SpectralSummary) -> dict[str, float]:
    """`ntk/...` scalars of a spectrum."""
    scalars = summary.scalars()
    scalars["energy_top5"] = scalars.pop("energy_concentration")
    scalars.pop("decay_offset")
    return {f"ntk/{name}": value for name, value in scalars.items() if torch.isfinite(torch.tensor(value))}
