"""Eigenvalues of a kernel."""

from typing import TYPE_CHECKING

import torch

from lightning_graphon._shared.checks import checked
from lightning_graphon.ntk import SpectralSummary
from lightning_graphon.plots.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checked
def plot_spectrum(spectrum: SpectralSummary, title: str = "") -> "Figure":
    """Eigenvalues of a kernel with the power-law fit, and their cumulative share of the trace.

    Args:
        spectrum: What `spectral_summary` returned.
        title: Title of the figure, which should name the kernel.
    """
    # Fixed margins: the automatic layout would take most of the drawing time.
    figure, axes = new_figure(1, 2, cell=(4.2, 3.2), layout=None)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.16, top=0.84, wspace=0.25)
    left, right = axes[0]
    values = spectrum.eigenvalues.detach().double().cpu()
    index = torch.arange(1, len(values) + 1, dtype=torch.float64)
    positive = values > 0
    fit = torch.exp(torch.tensor(spectrum.decay_offset)) * index**-spectrum.decay_rate
    left.loglog(index[positive].numpy(), values[positive].numpy(), ".", ms=4, label="eigenvalues")
    left.loglog(index.numpy(), fit.numpy(), "--", color="0.4", label=f"fit, λ ∝ k^(−{spectrum.decay_rate:.2f})")
    hidden = int((~positive).count_nonzero())
    note = f", {hidden} not positive are not shown" if hidden else ""
    left.set(xlabel=f"index k{note}", ylabel="eigenvalue λ of the kernel")
    left.legend(fontsize=7)
    # Without a positive trace there are no shares.
    energy = (values.cumsum(0) / spectrum.trace).numpy() if spectrum.trace > 0 else values.numpy()
    right.semilogx(index.numpy(), energy, drawstyle="steps-post")
    right.axvline(5, color="0.6", lw=0.8, ls=":")
    right.set(xlabel="number of largest eigenvalues", ylabel="share of the trace", ylim=(0, 1.02))
    right.set_title(f"top five: {spectrum.energy_concentration:.1%}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure
