"""Figures. matplotlib is imported when one is drawn, never its pyplot: no global state, nothing to close."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_graphon.graphon import HomogeneityTest, StepGraphon
    from lightning_graphon.ntk import SpectralSummary

_PIXELS = 256  # a mask is drawn at most this large; each pixel is then the density of its cell


def new_figure(rows: int, columns: int, cell: tuple[float, float], layout: Any = "constrained") -> tuple["Figure", Any]:
    """An Agg figure outside pyplot with a grid of axes, [rows, columns]; `cell` is (width, height) in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * cell[0], rows * cell[1]), layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def sort_by_degree(mask: Tensor) -> Tensor:
    """A mask as [outputs, inputs], both by degree, the best connected first; stable.

    Args:
        mask: bool [out, in, ...]; the taps of a convolution are averaged.

    Returns:
        float32 [out, in] in [0, 1].

    >>> sort_by_degree(torch.tensor([[False, False], [False, True]])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    density = mask.detach().float().cpu().reshape(mask.shape[0], mask.shape[1], -1).mean(-1)
    rows = density.sum(1).argsort(descending=True, stable=True)
    columns = density.sum(0).argsort(descending=True, stable=True)
    return density[rows][:, columns]


def plot_masks(masks: Mapping[str, Mapping[str, Tensor]], title: str = "") -> "Figure":
    """Degree-sorted masks: a row for each method, a column for each layer.

    Args:
        masks: Label of the row -> layer name -> bool mask [out, in, ...].
        title: Title of the whole figure.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not masks or not all(masks.values()):
        raise ValueError("no masks to draw: give at least one method with at least one layer")
    layers = max((list(group) for group in masks.values()), key=len)
    figure, axes = new_figure(len(masks), len(layers), cell=(1.9, 1.9))
    image: Any = None
    for row, (label, group) in enumerate(masks.items()):
        for column, (layer, mask) in enumerate(group.items()):
            axis = axes[row, column]
            image = _draw_mask(axis, mask)
            axis.set_title(f"{layer}\n" if row == 0 else "", fontsize=8)
            axis.text(0.98, 0.02, f"{mask.float().mean():.1%} kept", transform=axis.transAxes, **_NOTE)
            if column == 0:
                axis.set_ylabel(f"{label}\noutputs, by degree", fontsize=8)
            if row == len(masks) - 1:
                axis.set_xlabel("inputs, by degree", fontsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("fraction of weights kept", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


_NOTE: dict[str, Any] = {
    "ha": "right",
    "va": "bottom",
    "fontsize": 7,
    "bbox": {"facecolor": "white", "alpha": 0.8, "pad": 1.5, "linewidth": 0},
}


def _draw_mask(axis: Any, mask: Tensor) -> Any:
    values = sort_by_degree(mask)
    size = (min(_PIXELS, values.shape[0]), min(_PIXELS, values.shape[1]))
    pixels = torch.nn.functional.adaptive_avg_pool2d(values[None, None], size)[0, 0]
    axis.set_xticks([0, size[1] - 1], ["1", str(values.shape[1])], fontsize=6)
    axis.set_yticks([0, size[0] - 1], ["1", str(values.shape[0])], fontsize=6)
    return axis.imshow(pixels.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")


def plot_input_density(
    masks: Mapping[str, Mapping[str, Tensor]],
    image_shape: Sequence[int],
    *,
    mean_image: Tensor | None = None,
    title: str = "",
) -> "Figure":
    """Which pixels a network listens to: the share of first-layer units joined to each input, over the image.

    A row for each network or sparsity, a column for each method. The colour runs from 0 to 1 in every picture, on a
    square-root scale; inputs that are cut off, without a single weight, are blue.

    Args:
        masks: Label of the row -> label of the column -> first-layer mask [units, inputs], bool or shares in [0, 1].
        image_shape: (height, width) or (channels, height, width) of the input; channels are averaged.
        mean_image: Mean input of the data, any shape with as many entries, drawn in front of the first row.
        title: Title of the whole figure.

    Raises:
        ValueError: There is nothing to draw, or a mask does not have as many inputs as the image has pixels.
    """
    from matplotlib.colors import PowerNorm

    if not masks or not all(masks.values()):
        raise ValueError("no masks to draw: give at least one row with at least one method")
    front = int(mean_image is not None)
    columns = front + max(len(group) for group in masks.values())
    figure, axes = new_figure(len(masks), columns, cell=(1.75, 1.95))
    image: Any = None
    for row, (label, group) in enumerate(masks.items()):
        for column, (name, mask) in enumerate(group.items(), start=front):
            density = _over_image(mask.detach().float().flatten(1).mean(0), image_shape, f"the mask of {name!r}")
            axis = axes[row, column]
            style = {"cmap": "magma_r", "norm": PowerNorm(0.5, 0, 1), "interpolation": "nearest"}
            image = axis.imshow(density.where(density > 0, torch.nan).numpy(), **style)
            axis.set_facecolor("lightsteelblue")
            axis.set_title(name if row == 0 else "", fontsize=9)
            axis.set_xlabel(f"{int((density == 0).sum())} of {density.numel()} pixels cut off", fontsize=7)
            axis.set_ylabel(label if column == front else "", fontsize=9)
        for axis in (*axes[row, :front], *axes[row, front + len(group) :]):
            axis.set_axis_off()
    if mean_image is not None:
        pixels = _over_image(mean_image.detach().float().flatten(), image_shape, "mean_image")
        axes[0, 0].imshow(pixels.numpy(), cmap="gray", interpolation="nearest")
        axes[0, 0].set_title("mean image\nof the data", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.set_label("share of the hidden units joined to the pixel\n(blue: none)", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _over_image(values: Tensor, image_shape: Sequence[int], what: str) -> Tensor:
    """Values of the inputs as a picture [height, width], mean over channels."""
    shape = tuple(image_shape)
    if len(shape) not in (2, 3) or values.numel() != math.prod(shape):
        raise ValueError(
            f"{what} has {values.numel()} inputs, which is no image of shape {shape}: give image_shape=(height, width) "
            "or (channels, height, width)"
        )
    picture = values.cpu().reshape(shape)
    return picture.mean(0) if picture.ndim == 3 else picture


def plot_graphons(
    graphons: "Mapping[str, StepGraphon]",
    tests: "Mapping[str, HomogeneityTest] | None" = None,
    title: str = "",
) -> "Figure":
    """Graphons of the layers of one network, left to right from input to output, degree functions on the margins.

    Args:
        graphons: Layer name -> graphon.
        tests: Layer name -> outcome of the homogeneity test, for the verdict under the picture.
        title: Title of the figure.

    Raises:
        ValueError: There is nothing to draw.
    """
    return plot_graphon_grid({"": graphons}, {"": tests or {}}, title)


def plot_graphon_grid(
    graphons: "Mapping[str, Mapping[str, StepGraphon]]",
    tests: "Mapping[str, Mapping[str, HomogeneityTest]] | None" = None,
    title: str = "",
) -> "Figure":
    """Graphons of several networks: a row for each network or method, a column for each layer.

    The colour is the probability that a weight is kept, from 0 to 1 in every picture, on a square-root scale so that
    sparse layers show their structure.

    Args:
        graphons: Label of the row -> layer name -> graphon.
        tests: Label of the row -> layer name -> outcome of the homogeneity test.
        title: Title of the figure.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not graphons or not all(graphons.values()):
        raise ValueError("no graphons to draw: give at least one network with at least one layer")
    columns = max(len(group) for group in graphons.values())
    figure, axes = new_figure(len(graphons), columns, cell=(2.9, 2.9))
    image: Any = None
    for row, (label, group) in enumerate(graphons.items()):
        for column, (layer, graphon) in enumerate(group.items()):
            axis = axes[row, column]
            image = _draw_graphon(axis, graphon)
            test = (tests or {}).get(label, {}).get(layer)
            verdict = f"{test.verdict}, p {_p_value(test.p_value)}" if test else ""
            axis.set_xlabel(f"v, inputs of {layer}\ndensity {graphon.density:.1%}  {verdict}", fontsize=7)
            if column == 0:
                axis.set_ylabel(f"{label}\nu, outputs".lstrip(), fontsize=8)
        for axis in axes[row, len(group) :]:
            axis.set_axis_off()
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.set_label("W: probability that a weight is kept", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_graphon(axis: Any, graphon: "StepGraphon") -> Any:
    """The cells, and the two degree functions above and to the right, all on [0, 1]."""
    from matplotlib.colors import PowerNorm

    x, y = (_edges(measure).numpy() for measure in (graphon.col_measure, graphon.row_measure))
    values = graphon.values.detach().float().cpu().numpy()
    image = axis.pcolormesh(x, y, values, cmap="magma_r", norm=PowerNorm(0.5, 0, 1), rasterized=True)
    axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[0, 1], yticks=[0, 1])
    axis.tick_params(labelsize=6)
    top, right = axis.inset_axes((0, 1.03, 1, 0.18)), axis.inset_axes((1.03, 0, 0.18, 1))
    top.stairs(graphon.col_degree.detach().cpu().numpy(), x, fill=True, color="0.4")
    right.stairs(graphon.row_degree.detach().cpu().numpy(), y, fill=True, color="0.4", orientation="horizontal")
    top.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[0, 1])
    right.set(ylim=(1, 0), xlim=(0, 1), yticks=[], xticks=[0, 1])
    for margin in (top, right):
        margin.tick_params(labelsize=5, length=2)
        margin.spines[["top", "right"]].set_visible(False)
    top.set_title("degree (fraction of possible weights)", fontsize=6, pad=2)
    return image


def _p_value(p: float) -> str:
    return f"= {p:.1g}" if p >= 1e-16 else "< 1e-16"


def _edges(measure: Tensor) -> Tensor:
    ends = torch.cat([measure.new_zeros(1), measure.detach().cumsum(0)]).cpu()
    return ends / ends[-1]


def plot_spectrum(spectrum: "SpectralSummary", title: str = "") -> "Figure":
    """Eigenvalues of a kernel with the power-law fit, and the share of the trace in the largest of them.

    Args:
        spectrum: What `spectral_summary` returned.
        title: Title of the figure; it should say which kernel this is.
    """
    # Margins by hand: the automatic layout would take most of the drawing time.
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
    energy = (values.cumsum(0) / spectrum.trace).numpy() if spectrum.trace > 0 else values.numpy()
    right.semilogx(index.numpy(), energy, drawstyle="steps-post")
    right.axvline(5, color="0.6", lw=0.8, ls=":")
    right.set(xlabel="number of largest eigenvalues", ylabel="share of the trace", ylim=(0, 1.02))
    right.set_title(f"top five: {spectrum.energy_concentration:.1%}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure
