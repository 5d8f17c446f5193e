"""Degree-sorted masks of several methods, side by side."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.plots.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PIXELS = 256  # per side at most; each pixel is the density of its cell


@checked
def sort_by_degree(mask: Tensor) -> Tensor:
    """A mask as [outputs, inputs], both in descending order of degree; ties keep their order.

    Args:
        mask: Mask [out, in, ...]; the taps of a convolution are averaged.

    Returns:
        Densities [out, in] in [0, 1], float32.

    >>> sort_by_degree(torch.tensor([[False, False], [False, True]])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    density = mask.detach().float().cpu().reshape(mask.shape[0], mask.shape[1], -1).mean(-1)
    rows = density.sum(1).argsort(descending=True, stable=True)
    columns = density.sum(0).argsort(descending=True, stable=True)
    return density[rows][:, columns]


@checked
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
    box = {"facecolor": "white", "alpha": 0.8, "pad": 1.5, "linewidth": 0}
    for row, (label, group) in enumerate(masks.items()):
        for column, (layer, mask) in enumerate(group.items()):
            axis = axes[row, column]
            image = _draw_mask(axis, mask)
            axis.set_title(f"{layer}\n" if row == 0 else "", fontsize=8)
            note = {"transform": axis.transAxes, "ha": "right", "va": "bottom", "fontsize": 7, "bbox": box}
            axis.text(0.98, 0.02, f"{mask.float().mean():.1%} kept", **note)
            if column == 0:
                axis.set_ylabel(f"{label}\noutputs, by degree", fontsize=8)
            if row == len(masks) - 1:
                axis.set_xlabel("inputs, by degree", fontsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("fraction of weights kept", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_mask(axis: Any, mask: Tensor) -> Any:
    values = sort_by_degree(mask)
    size = (min(_PIXELS, values.shape[0]), min(_PIXELS, values.shape[1]))
    # Averages over cells, so that a large mask is drawn as its density.
    pixels = torch.nn.functional.adaptive_avg_pool2d(values[None, None], size)[0, 0]
    axis.set_xticks([0, size[1] - 1], ["1", str(values.shape[1])], fontsize=6)
    axis.set_yticks([0, size[0] - 1], ["1", str(values.shape[0])], fontsize=6)
    return axis.imshow(pixels.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
