"""Figures: what is drawn, and nothing left behind."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_graphon.graphon import homogeneity_test, layer_graphons
from lightning_graphon.plots import plot_graphon_grid, plot_graphons, plot_masks, sort_by_degree
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


def test_nothing_to_draw():
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
