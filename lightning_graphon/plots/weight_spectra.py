"""Eigenvalues of masked weights beside their null."""

from typing import TYPE_CHECKING

import torch

from lightning_graphon._shared.checks import checked
from lightning_graphon.graphon import WeightSpectrum
from lightning_graphon.plots.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checked
def plot_weight_spectrum(spectrum: WeightSpectrum, title: str = "") -> "Figure":
    """Singular values of masked weights, the bulk law of their variance profile, and what lies beyond it.

    Args:
        spectrum: What `weight_spectrum` returned.
        title: Title of the figure, which should name the layer.
    """
    figure, axes = new_figure(1, 1, cell=(5.0, 3.2), layout=None)
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.16, top=0.88)
    panel = axes[0][0]
    # Singular values, as the eigenvalues of a wide range crowd at zero.
    values = spectrum.eigenvalues.clamp(min=0).sqrt()
    panel.hist(values.numpy(), bins=60, density=True, color="0.75", label="singular values")
    where = spectrum.grid.sqrt()
    panel.plot(where.numpy(), (2 * where * spectrum.density).numpy(), "C0", label="bulk law of the variance profile")
    panel.axvline(spectrum.beyond**0.5, color="C0", lw=0.8, ls=":", label="end of what chance gives")
    height = 0.04 * torch.tensor(panel.get_ylim()[1]).item()
    for name, where, marker in (
        ("outliers of the mean", spectrum.drift_outliers, "C2v"),
        (f"spikes beyond both: {len(spectrum.spikes)}", spectrum.spikes, "C3^"),
    ):
        if len(where):
            panel.plot(where.sqrt().numpy(), [height] * len(where), marker, ms=5, label=name)
    panel.set(xlabel="singular value of the masked weights", ylabel="density")
    panel.legend(fontsize=7)
    panel.set_title(title, fontsize=9)
    return figure
