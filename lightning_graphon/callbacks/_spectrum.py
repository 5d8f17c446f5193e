"""The tangent kernel of a network under its masks: from its graphons where they suffice, else exactly."""

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_graphon.callbacks._network import Network, find_network
from lightning_graphon.ntk import SpectralSummary, empirical_ntk, graphon_ntk_from_model, spectral_summary
from lightning_graphon.pruning.untouched import untouched

KERNELS = ("auto", "graphon", "empirical")


class KernelSpectrum:
    """Spectrum of the tangent kernel on a probe batch that is drawn once.

    Args:
        kernel: "graphon", "empirical", or "auto": graphon where the network is a chain of Linear layers.
        propagate: "energy", "density" or "drift", for the Graphon NTK.
        size: Samples in the probe batch.
        seed: Seed of the probe batch.
    """

    def __init__(self, kernel: str, propagate: str, size: int, seed: int) -> None:
        self.kernel, self.propagate, self.size, self.seed = kernel, propagate, size, seed
        self.source = ""
        self._network: Network | None = None

    def evaluate(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Mapping[str, Tensor]
    ) -> SpectralSummary:
        """Spectrum at the current weights; `source` then says which kernel it is."""
        if self._network is None:
            self._network = find_network(trainer, pl_module, self.size, self.seed)
        network = self._network
        kernel = self._kernel(network.module, network.inputs, network.own_masks(pl_module, masks))
        return spectral_summary(kernel, network.labels)

    def _kernel(self, module: nn.Module, inputs: Tensor, masks: dict[str, Tensor]) -> Tensor:
        if self.kernel != "empirical":
            try:
                kernel = graphon_ntk_from_model(module, inputs, masks, propagate=self.propagate)
            except ValueError:
                if self.kernel == "graphon":
                    raise
            else:
                self.source = f"Graphon NTK ({self.propagate}, float64)"
                return kernel
        return self._empirical(module, inputs, masks)

    def _empirical(self, module: nn.Module, inputs: Tensor, masks: dict[str, Tensor]) -> Tensor:
        """In float64 where the module's code and the device allow it."""
        with untouched(module):
            try:
                module.double()
                kernel = empirical_ntk(module, inputs.double() if inputs.is_floating_point() else inputs, masks=masks)
            except (RuntimeError, TypeError):
                kernel = None
        if kernel is None:
            kernel = empirical_ntk(module, inputs, masks=masks)
        self.source = f"empirical NTK ({str(kernel.dtype).removeprefix('torch.')})"
        return kernel


def spectrum_scalars(summary: SpectralSummary) -> dict[str, float]:
    """`ntk/...` scalars of a spectrum."""
    scalars = summary.scalars()
    scalars["energy_top5"] = scalars.pop("energy_concentration")
    scalars.pop("decay_offset")
    return {f"ntk/{name}": value for name, value in scalars.items() if torch.isfinite(torch.tensor(value))}
