"""Which pixels of an image a network reads."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.plots.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checked
def plot_input_density(
    masks: Mapping[str, Mapping[str, Tensor]],
    image_shape: Sequence[int],
    *,
    mean_image: Tensor | None = None,
    title: str = "",
) -> "Figure":
    """Which pixels a network reads: the share of first-layer units joined to each input, over the image.

    A row for each network or sparsity, a column for each method. The colour runs from 0 to 1 in every picture, on a
    square-root scale; inputs without any weight are blue.

    Args:
        masks: Label of the row -> label of the column -> first-layer mask [units, inputs], bool or shares in [0, 1].
        image_shape: (height, width) or (channels, height, width) of the input; channels are averaged.
        mean_image: Mean input of the data, of any shape, drawn in front of the first row.
        title: Title of the whole figure.

    Raises:
        ValueError: There is nothing to draw, or a mask does not have one input per pixel.
    """
    from matplotlib.colors import PowerNorm

    if not masks or not all(masks.values()):
        raise ValueError("no masks to draw: give at least one row with at least one method")
    # The mean image takes a column of its own.
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
