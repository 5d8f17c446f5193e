"""Figures: what is drawn, and nothing left behind."""

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from lightning_graphon.graphon import homogeneity_test, layer_graphons
from lightning_graphon.plots import (
    plot_graphon_grid,
    plot_graphons,
    plot_input_density,
    plot_loss_decay,
    plot_masks,
    sort_by_degree,
)
from lightning_graphon.pruning import Masks


@pytest.fixture
def masks():
    return Masks({"a.weight": torch.rand(20, 10) < 0.3, "b.weight": torch.rand(5, 20) < 0.3})


def test_sorting_puts_the_best_connected_first_and_loses_nothing():
    mask = torch.rand(30, 20, 3, 3) < 0.2
    ordered = sort_by_degree(mask)
    assert ordered.shape == (30, 20)
    assert bool((ordered.sum(1).diff() <= 1e-6).all())
    assert bool((ordered.sum(0).diff() <= 1e-6).all())
    # Sums of float32 means over nine taps.
    assert float(ordered.mean()) == pytest.approx(float(mask.float().mean()), abs=1e-6)


def test_masks_figure_names_methods_and_layers(masks):
    figure = plot_masks({"snip": masks, "random": masks}, "title")
    texts = {t.get_text() for axis in figure.axes for t in (axis.title, axis.yaxis.label)}
    assert any("a.weight" in text for text in texts)
    assert any("snip" in text for text in texts)
    images = [image for axis in figure.axes for image in axis.get_images()]
    assert len(images) == 4
    assert {image.get_clim() for image in images} == {(0, 1)}


def test_graphon_figure_has_a_fixed_colour_range_margins_and_a_verdict(masks):
    graphons = layer_graphons(masks)
    tests = {name: homogeneity_test(mask) for name, mask in masks.items()}
    figure = plot_graphons(graphons, tests, "title")
    meshes = [
        mesh for axis in figure.axes for mesh in axis.collections if hasattr(mesh, "norm") and mesh.norm.vmax == 1
    ]
    assert len([m for m in meshes if m.norm.vmin == 0 and m.get_array() is not None]) >= 2
    labels = " ".join(axis.get_xlabel() for axis in figure.axes)
    assert tests["a.weight"].verdict in labels
    assert "density" in labels
    margins = [child for axis in figure.axes for child in axis.child_axes]
    assert len(margins) == 4
    assert {axis.get_ylim() for axis in margins[::2]} == {(0.0, 1.0)}


def test_rows_of_unequal_length_are_fine(masks):
    graphons = layer_graphons(masks)
    short = {"a.weight": graphons["a.weight"]}
    figure = plot_graphon_grid({"two": graphons, "one": short})
    figure.canvas.draw()
    assert np.asarray(figure.canvas.buffer_rgba()).std() > 0


@pytest.mark.parametrize("lines", [1, 2, 3, 4])
def test_title_of_a_grid_stands_clear_of_the_pictures(masks, lines):
    figure = plot_graphon_grid(dict.fromkeys("abcd", layer_graphons(masks, bins=5)), title="\n".join(["title"] * lines))
    renderer = figure.canvas.get_renderer()
    title = figure._suptitle.get_window_extent(renderer)
    assert title.y0 > max(axis.get_tightbbox(renderer).y1 for axis in figure.axes)
    assert title.y1 < figure.bbox.y1


def test_no_label_of_a_grid_stands_on_another(masks):
    figure = plot_graphon_grid(dict.fromkeys("ab", layer_graphons(masks, bins=5)))
    renderer = figure.canvas.get_renderer()
    axes = [part for axis in figure.axes for part in (axis, *axis.child_axes)]
    labels = [t for axis in axes for t in (*axis.get_xticklabels(), *axis.get_yticklabels()) if t.get_text()]
    boxes = [label.get_window_extent(renderer) for label in labels]
    assert len(boxes) > 20
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


@pytest.mark.parametrize(("low", "high"), [(0.36, 2.31), (1.0, 73.0), (2.25, 2.3), (1.51, 2.3), (1e-6, 5.0)])
def test_losses_of_any_range_have_three_numbers_at_least_on_their_axis(low, high):
    axis = plot_loss_decay({"observed": {0: high, 24: low}}).axes[0]
    axis.figure.canvas.draw()
    bottom, top = axis.get_ylim()
    labels = zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
    shown = {at: float(label.get_text()) for at, label in labels if bottom <= at <= top}
    assert len(shown) >= 3
    assert list(shown.values()) == pytest.approx(list(shown))


def test_input_density_is_drawn_over_the_image_and_cut_off_pixels_are_marked():
    mask = torch.rand(50, 12) < 0.5
    mask[:, 5] = False
    figure = plot_input_density({"90 %": {"snip": mask}}, (3, 4), mean_image=torch.arange(12.0), title="title")
    front, picture = figure.axes[:2]
    assert picture.get_title() == "snip"
    assert "1 of 12 pixels cut off" in picture.get_xlabel()
    (drawn,) = picture.get_images()
    assert drawn.get_clim() == (0, 1)
    values = drawn.get_array()
    np.testing.assert_allclose(values.filled(0), mask.float().mean(0).reshape(3, 4))
    assert values.mask.ravel().nonzero()[0].tolist() == [5]
    assert front.get_images()[0].get_array().ravel().tolist() == list(range(12))
    assert "hidden units" in figure.axes[-1].get_ylabel()


def test_channels_of_the_input_are_averaged_and_rows_may_be_short():
    mask = torch.tensor([[True, False, True, True, False, False, True, False]])  # two channels of 2 x 2
    figure = plot_input_density({"a": {"x": mask, "y": mask}, "b": {"x": mask}}, (2, 2, 2))
    assert figure.axes[0].get_images()[0].get_array().filled(0).tolist() == [[0.5, 0.0], [1.0, 0.5]]
    figure.canvas.draw()


def test_a_mask_that_is_no_image_is_refused():
    with pytest.raises(ValueError, match="mask of 'snip' has 10 inputs, which is no image of shape \\(3, 4\\)"):
        plot_input_density({"a": {"snip": torch.ones(5, 10)}}, (3, 4))
    with pytest.raises(ValueError, match="mean_image has 3 inputs"):
        plot_input_density({"a": {"snip": torch.ones(5, 12)}}, (3, 4), mean_image=torch.ones(3))


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no masks to draw"):
        plot_input_density({}, (2, 2))
    with pytest.raises(ValueError, match="no masks to draw"):
        plot_masks({})
    with pytest.raises(ValueError, match="no graphons to draw"):
        plot_graphons({})


def test_many_figures_leave_none_open(masks):
    graphons = layer_graphons(masks, bins=4)
    for _ in range(20):
        plot_graphons({"a.weight": graphons["a.weight"]})
    plt = sys.modules.get("matplotlib.pyplot")
    assert plt is None or plt.get_fignums() == []


def test_matplotlib_is_not_imported_until_something_is_drawn():
    # torchmetrics imports it by itself, so this cannot hold for the callbacks.
    code = (
        "import sys, lightning_graphon.plots, lightning_graphon.pruning, lightning_graphon.graphon; "
        "assert 'matplotlib' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_axis_cuts_off_is_said_in_words():
    observed = {0: 2.0, 10: 1.0, 20: 0.5}
    curves = {"observed": observed, "predicted": {0: 2.0, 10: 4.0, 20: 38.0}, "refreshed": {10: 1.0, 20: 0.1}}
    band = torch.tensor([0, 10, 20]), torch.tensor([2.0, 1.0, 0.5]), torch.tensor([2.0, 2.1, torch.inf])
    axis = plot_loss_decay(curves, band=band).axes[0]
    assert axis.get_ylim() == pytest.approx((0.375, 2.6))
    words = [text.get_text() for text in axis.get_legend().get_texts()]
    assert words == [
        "observed",
        "theory: the network linearised at the start\n(cut off from step 10, reaches 38)",
        "theory, since the last refresh\n(cut off from step 20, reaches 0.1)",
        "its band and the tolerance\n(cut off from step 20, reaches inf)",
    ]
    inside = plot_loss_decay({"observed": observed, "predicted": observed}).axes[0]
    assert next(text.get_text() for text in inside.get_legend().get_texts()) == "observed"
    assert "cut off" not in str([text.get_text() for text in inside.get_legend().get_texts()])
