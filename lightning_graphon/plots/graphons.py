"""Graphons of layers with their degree functions, for one network or several."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_graphon._shared.checks import checked
from lightning_graphon.graphon import HomogeneityTest, StepGraphon
from lightning_graphon.graphon.core.partition import edges
from lightning_graphon.plots.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLOUR_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)


@checked
def plot_graphons(
    graphons: Mapping[str, StepGraphon], tests: Mapping[str, HomogeneityTest] | None = None, title: str = ""
) -> "Figure":
    """Graphons of the layers of one network, from input to output, with degree functions on the margins.

    Args:
        graphons: Layer name -> graphon.
        tests: Layer name -> outcome of the homogeneity test, for the verdict under the picture.
        title: Title of the figure.

    Raises:
        ValueError: There is nothing to draw.
    """
    return plot_graphon_grid({"": graphons}, {"": tests or {}}, title)


@checked
def plot_graphon_grid(
    graphons: Mapping[str, Mapping[str, StepGraphon]],
    tests: Mapping[str, Mapping[str, HomogeneityTest]] | None = None,
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
    # Fixed margins, in inches: the automatic layout would take most of the drawing time.
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
            verdict = f"{test.verdict}, p {p_value_text(test.p_value)}" if test else ""
            axis.set_xlabel(f"v, inputs of {layer}\ndensity {graphon.density:.1%}  {verdict}", fontsize=7)
            if column == 0:
                axis.set_ylabel(f"{label}\nu, outputs".lstrip(), fontsize=8)
        for axis in axes[row, len(group) :]:
            axis.set_axis_off()
    bar_axes = figure.add_axes((1 - 0.85 / wide, 0.55 / high, 0.12 / wide, 1 - (top + 0.55) / high))
    bar = figure.colorbar(image, cax=bar_axes, ticks=COLOUR_TICKS)
    bar.ax.tick_params(labelsize=6)
    bar.set_label("W: probability that a weight is kept", fontsize=8 if rows > 1 else 6)
    figure.suptitle(title, fontsize=11, y=1 - 0.1 / high, va="top")
    return figure


def _draw_graphon(axis: Any, graphon: StepGraphon) -> Any:
    """The cells, and the two degree functions above and to the right, all on [0, 1]."""
    from matplotlib.colors import PowerNorm

    x, y = (edges(measure.cpu()).numpy() for measure in (graphon.col_measure, graphon.row_measure))
    values = graphon.values.detach().float().cpu().numpy()
    # Rasterised, as a vector image of 64 by 64 cells would be large; the root shows sparse layers.
    image = axis.pcolormesh(x, y, values, cmap="magma_r", norm=PowerNorm(0.5, 0, 1), rasterized=True)
    axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[0, 1], yticks=[0, 1])
    axis.tick_params(labelsize=6)
    top, right = axis.inset_axes((0, 1.03, 1, 0.18)), axis.inset_axes((1.03, 0, 0.18, 1))
    top.stairs(graphon.col_degree.detach().cpu().numpy(), x, fill=True, color="0.4")
    right.stairs(graphon.row_degree.detach().cpu().numpy(), y, fill=True, color="0.4", orientation="horizontal")
    top.set(xlim=(0, 1), ylim=(0, 1), xticks=[])
    top.set_yticks([0, 1], ["", "1"])  # its 0 would cover the 0 of the cells, or their 1 below
    right.set(ylim=(1, 0), xlim=(0, 1), yticks=[])
    right.set_xticks([0, 1], ["", "1"])
    for margin in (top, right):
        margin.tick_params(labelsize=5, length=2)
        margin.spines[["top", "right"]].set_visible(False)
    top.set_title("degree (fraction of possible weights)", fontsize=6, pad=2)
    return image


def p_value_text(p: float) -> str:
    """A p-value for a caption, to follow the letter p."""
    return f"= {p:.1g}" if p >= 1e-16 else "< 1e-16"
