"""Where the graphons of layers went while their masks changed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_graphon._shared.checks import checked
from lightning_graphon.graphon import FlowPoint
from lightning_graphon.plots.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = (2.6, 2.5)  # inches


@checked
def plot_graphon_flow(
    flows: Mapping[str, Sequence[FlowPoint]], title: str = "Flow of the layers' graphons"
) -> "Figure":
    """A row for each layer: its graphon at start, middle and end, its path, its degrees over time.

    In the three pictures every unit stands where it stood at the start, sorted by degree; the colour is the density
    relative to the layer's largest, as its square root. The path leads from the distance from the limit of the start's
    method at the same density; the dashed line is where as many weights exchanged at random would be.

    Args:
        flows: Layer -> points of its flow, as `LayerFlow.points`.
        title: Of the figure.

    Raises:
        ValueError: There is nothing to draw.

    >>> from lightning_graphon.graphon import LayerFlow
    >>> import torch
    >>> flow = LayerFlow(torch.eye(8).bool())
    >>> _ = flow.look(torch.eye(8).bool().flip(0), step=10)
    >>> len(plot_graphon_flow({"fc": flow.points}).axes)
    5
    """
    if not flows:
        raise ValueError("no flow to draw: give the points of at least one layer")
    figure, axes = new_figure(len(flows), 5, _CELL)
    for row, (name, points) in zip(axes, flows.items(), strict=True):
        _pictures(row[:3], name, points)
        _path(row[3], points)
        _degrees(row[4], points)
    axes[0][3].set_title("path: start ○, end ●", fontsize=9)
    axes[0][4].set_title("degrees: median, quartiles, range", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _pictures(axes: Sequence[Any], name: str, points: Sequence[FlowPoint]) -> None:
    half = (points[0].step + points[-1].step) / 2
    shown = points[0], min(points, key=lambda point: abs(point.step - half)), points[-1]
    largest = max(float(point.cells.max()) for point in shown) or 1.0
    for axis, point in zip(axes, shown, strict=True):
        cells = np.sqrt(point.cells.numpy() / largest)
        axis.imshow(cells, cmap="magma_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"step {point.step:,}", fontsize=9)
    short = name.removesuffix(".weight")
    axes[0].set_ylabel(f"layer {short}\noutputs", fontsize=9)
    axes[0].set_xlabel("inputs", fontsize=8)
    axes[2].set_xlabel(f"darkest: {largest:.2g} kept", fontsize=8)


def _path(axis: Any, points: Sequence[FlowPoint]) -> None:
    x, y, chance = ([getattr(p, key) for p in points] for key in ("moved", "limit_distance", "by_chance"))
    axis.plot(x, y, "-", color="tab:blue", lw=1.2)
    axis.plot(x[1:-1], y[1:-1], ".", color="tab:blue", ms=3)
    axis.plot(x[:1], y[:1], "o", color="black", mfc="white", ms=6)
    axis.plot(x[-1:], y[-1:], "o", color="black", ms=6)
    axis.axvline(chance[-1], color="grey", ls="--", lw=1)
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=-0.03 * max(*x, chance[-1], 1e-9))
    axis.set_xlabel("L2 from the start (dashed: by chance)", fontsize=8)
    axis.set_ylabel("L2 from the start's limit", fontsize=8)
    axis.tick_params(labelsize=7)


def _degrees(axis: Any, points: Sequence[FlowPoint]) -> None:
    steps = [point.step for point in points]
    for key, colour, label in (("row_degrees", "tab:blue", "outputs"), ("col_degrees", "tab:orange", "inputs")):
        low, first, median, third, high = np.stack([getattr(point, key).numpy() for point in points], 1)
        axis.fill_between(steps, low, high, color=colour, alpha=0.1, lw=0)
        axis.fill_between(steps, first, third, color=colour, alpha=0.3, lw=0)
        axis.plot(steps, median, color=colour, lw=1.2, label=label)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel("share of a unit's weights kept", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, loc="upper left")
