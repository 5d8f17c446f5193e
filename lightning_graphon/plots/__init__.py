"""Figures, one module a picture. matplotlib is imported when one is drawn, never its pyplot."""

from lightning_graphon.plots.figure import new_figure
from lightning_graphon.plots.flow import plot_graphon_flow
from lightning_graphon.plots.graphon_images import graphon_image
from lightning_graphon.plots.graphons import p_value_text, plot_graphon_grid, plot_graphons
from lightning_graphon.plots.inputs import plot_input_density
from lightning_graphon.plots.losses import Curves, few_ticks, plot_loss_decay, plot_loss_decays
from lightning_graphon.plots.masks import plot_masks, sort_by_degree
from lightning_graphon.plots.spectrum import plot_spectrum
from lightning_graphon.plots.spectrum_images import spectrum_image
from lightning_graphon.plots.weight_spectra import plot_weight_spectrum

__all__ = [
    "Curves",
    "few_ticks",
    "graphon_image",
    "new_figure",
    "p_value_text",
    "plot_graphon_flow",
    "plot_graphon_grid",
    "plot_graphons",
    "plot_input_density",
    "plot_loss_decay",
    "plot_loss_decays",
    "plot_masks",
    "plot_spectrum",
    "plot_weight_spectrum",
    "sort_by_degree",
    "spectrum_image",
]
