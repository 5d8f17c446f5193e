"""Figures. matplotlib is imported when one is drawn, never its pyplot: no global state, nothing to close."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_graphon.graphon import HomogeneityTest, StepGraphon
    from lightning_graphon.ntk import SpectralSummary

Curves: TypeAlias = Mapping[str, Mapping[int, float]]
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
    rows = len(graphons)
    # Margins by hand, in inches: the automatic layout would take most of the drawing time.
    figure, axes = new_figure(rows, columns, cell=(2.9, 2.9), layout=None)
    wide, high = 2.9 * columns, 2.9 * rows
    top = 0.62 + 0.19 * max(2, title.count("\n") + 1)
    figure.subplots_adjust(
        left=0.55 / wide, right=1 - 1.5 / wide, bottom=0.55 / high, top=1 - top / high, wspace=0.42, hspace=0.62
    )
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
    beside = figure.add_axes((1 - 0.85 / wide, 0.55 / high, 0.12 / wide, 1 - (top + 0.55) / high))
    bar = figure.colorbar(image, cax=beside, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.ax.tick_params(labelsize=6)
    bar.set_label("W: probability that a weight is kept", fontsize=8 if rows > 1 else 6)
    figure.suptitle(title, fontsize=11, y=1 - 0.1 / high, va="top")
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


def plot_loss_decay(
    curves: Curves,
    *,
    band: tuple[Tensor, Tensor, Tensor] | None = None,
    void_from: int | None = None,
    shares: Tensor | None = None,
    title: str = "",
) -> "Figure":
    """Predicted and observed loss against optimizer steps, and the kernel modes that carry the fall.

    Args:
        curves: "observed", and where there are any "predicted" and "refreshed": step -> loss.
        band: steps, lower and upper losses of the two predictions that differ in the probe's self-terms.
        void_from: step from which the prediction no longer holds.
        shares: share of the initial fall of the loss in each mode of the kernel, the largest eigenvalue first.
        title: Title of the whole figure.
    """
    figure, axes = new_figure(1, 1 if shares is None else 2, cell=(4.6, 3.4), layout=None)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.16, top=0.86, wspace=0.25)
    _draw_losses(axes[0, 0], curves, band, void_from)
    axes[0, 0].legend(fontsize=7)
    if shares is not None:
        _draw_shares(axes[0, 1], shares)
    figure.suptitle(title, fontsize=9)
    return figure


def plot_loss_decays(
    curves: Mapping[str, Curves], void_from: Mapping[str, int | None] | None = None, title: str = ""
) -> "Figure":
    """Predicted and observed loss of several networks, side by side.

    Args:
        curves: Label -> curves as in `plot_loss_decay`.
        void_from: Label -> step from which the prediction no longer holds.
        title: Title of the whole figure.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not curves:
        raise ValueError("no curves to draw: give at least one network")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = new_figure(rows, columns, cell=(3.4, 2.6))
    handles: dict[str, Any] = {}
    for axis, (label, own) in zip(axes.flat, curves.items(), strict=False):
        _draw_losses(axis, own, None, (void_from or {}).get(label))
        axis.set_title(label, fontsize=9)
        handles.update({text: line for line, text in zip(*axis.get_legend_handles_labels(), strict=True)})
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_losses(axis: Any, curves: Curves, band: tuple[Tensor, Tensor, Tensor] | None, void_from: int | None) -> None:
    styles = {
        "observed": ("#1b1b1b", "-", "observed"),
        "predicted": ("#c2410c", "--", "predicted at the start"),
        "refreshed": ("#0369a1", ":", "predicted at the last refresh"),
    }
    for name, (color, line, label) in styles.items():
        if curves.get(name):
            axis.plot(list(curves[name]), list(curves[name].values()), color=color, ls=line, lw=1.6, label=label)
    if band is not None:
        at, lower, upper = (t.double().cpu().numpy() for t in band)
        axis.fill_between(at, lower, upper, color="#c2410c", alpha=0.15, lw=0, label="band of the finite probe")
    if void_from is not None:
        last = max(curves["observed"])
        axis.axvspan(void_from, last, color="0.5", alpha=0.13, lw=0, label="first prediction no longer holds")
    low, high = _range([value for value in curves["observed"].values() if math.isfinite(value)])
    if low > 0:
        axis.set_yscale("log")
        _few_ticks(axis, wide=high > 10 * low)
    axis.set_ylim(low, high)
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.set_ylabel("loss of the probe batch", fontsize=8)
    axis.tick_params(labelsize=7, which="both")


def _few_ticks(axis: Any, *, wide: bool) -> None:
    """Plain numbers on a logarithmic axis, between the powers of ten too where there are few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())


def _range(observed: list[float]) -> tuple[float, float]:
    """Limits around the observed curve with room for predictions that are wrong, but not for ones that explode."""
    if not observed:
        return 0.0, 1.0
    low, high = min(observed), max(observed)
    if low > 0:
        return 0.75 * low, 1.3 * high
    room = 0.3 * max(high - low, 1e-12)
    return low - room, high + room


def _draw_shares(axis: Any, shares: Tensor) -> None:
    total = shares.detach().double().cpu().cumsum(0)
    axis.semilogx(torch.arange(1, len(total) + 1).numpy(), total.numpy(), drawstyle="steps-post")
    axis.set(xlabel="number of largest kernel modes", ylabel="share of the initial fall", ylim=(0, 1.02))
    axis.set_title(f"top five modes: {float(total[:5][-1]):.0%}", fontsize=8)
    axis.tick_params(labelsize=7)
