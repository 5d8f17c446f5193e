"""The pictures that callbacks draw straight in pixels."""

import math

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from lightning_graphon import plots
from lightning_graphon.graphon import HomogeneityTest, StepGraphon, homogeneity_test
from lightning_graphon.ntk import spectral_summary
from lightning_graphon.plots.canvas import BLACK, BLUE, GREY, Canvas
from lightning_graphon.plots.spectrum_images import _log_ticks

X, Y, SIDE, GAP, HIGH = 46, 80, 160, 4, 24  # the cells of a layer, and the degree functions
NEAREST = 1  # of 255


def graphon_image(*args, **kwargs):
    return np.asarray(plots.graphon_image(*args, **kwargs))


def spectrum_image(*args, **kwargs):
    return np.asarray(plots.spectrum_image(*args, **kwargs))


def test_cells_have_the_colours_of_the_probability_on_a_square_root_scale():
    values = torch.tensor([[0.0, 1.0], [0.25, 0.01]])
    picture = graphon_image({"a": StepGraphon(values, row_measure=[0.25, 0.75])})
    places = {(0, 0): (1 / 8, 1 / 4), (0, 1): (1 / 8, 3 / 4), (1, 0): (5 / 8, 1 / 4), (1, 1): (5 / 8, 3 / 4)}
    for cell, (u, v) in places.items():
        expected = colormaps["magma_r"](math.sqrt(values[cell]), bytes=True)[:3]
        assert picture[int(Y + u * SIDE), int(X + v * SIDE)].tolist() == pytest.approx(list(expected), abs=NEAREST)
    # The border lies where the measure says, to a pixel.
    column = picture[Y + 1 : Y + SIDE - 1, X + SIDE // 4]
    assert abs(int((column != column[0]).any(1).argmax()) + 1 - SIDE // 4) <= 1


def test_margins_are_the_degree_functions():
    picture = graphon_image({"a": StepGraphon([[0.5, 0.0], [1.0, 0.0]])})
    above = picture[Y - GAP - HIGH : Y - GAP, X + SIDE // 4]
    assert (above == (102, 102, 102)).all(1).mean() == pytest.approx(0.75, abs=1.5 / HIGH)  # a pixel and the axis
    assert not (picture[Y - GAP - HIGH : Y - GAP - 1, X + 3 * SIDE // 4] == (102, 102, 102)).all(1).any()
    beside = picture[Y + 3 * SIDE // 4, X + SIDE + GAP : X + SIDE + GAP + HIGH]
    assert (beside == (102, 102, 102)).all(1).mean() == pytest.approx(0.5, abs=1.5 / HIGH)


def test_every_layer_has_its_place_and_rows_are_of_three():
    graphon = StepGraphon([[0.5]])
    two, three, four, six = (graphon_image({f"l{i}": graphon for i in range(n)}) for n in (2, 3, 4, 6))
    assert two.shape == three.shape
    assert three.shape[0] < four.shape[0] == six.shape[0]
    assert three.shape[1] == four.shape[1]
    colour = [int(c) for c in colormaps["magma_r"](math.sqrt(0.5), bytes=True)[:3]]
    painted = [int((abs(image.astype(int) - colour).max(-1) <= 2).sum()) for image in (two, three, four, six)]
    assert painted == pytest.approx([n * painted[0] / 2 for n in (2, 3, 4, 6)], rel=0.02)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: graphon_image({f"l{i}": StepGraphon([[0.5]]) for i in range(6)}, title="a\nb"),
        lambda: graphon_image({"a": StepGraphon([[0.5]])}),
        lambda: spectrum_image(spectral_summary(torch.eye(4).double())),
    ],
)
def test_pictures_fit_a_card(draw):
    """Cards of TensorBoard are 370 by 235 pixels: text of 9 points stays at 9 pixels or more."""
    height, width, _ = draw().shape
    assert min(370 / width, 235 / height) * 9 * 100 / 72 >= 9


def test_long_names_are_cut_in_front():
    graphon, beginning = StepGraphon([[0.5]]), "a" * 50
    cut, other = (graphon_image({f"{first}{beginning}.x": graphon}) for first in "bc")
    assert (cut == other).all()
    assert (cut != graphon_image({f"b{beginning}.y": graphon})).any()


def test_verdicts_and_titles_are_written():
    graphons = {"a": StepGraphon([[0.5]])}
    test = homogeneity_test(torch.eye(4).bool())
    assert isinstance(test, HomogeneityTest)
    plain = graphon_image(graphons)
    assert (plain != graphon_image(graphons, {"a": test}))[20:36].any()
    assert (plain != graphon_image(graphons, title="title"))[:20].any()


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0])
def test_scale_is_dots_and_not_layout(scale):
    picture = graphon_image({"a": StepGraphon([[0.5]])}, scale=scale)
    assert picture.shape[0] == round(262 * scale)
    assert picture.dtype == np.uint8
    inside = picture[round((Y + SIDE / 2) * scale), round((X + SIDE / 2) * scale)]
    assert inside.tolist() == pytest.approx(list(colormaps["magma_r"](math.sqrt(0.5), bytes=True)[:3]), abs=NEAREST)


def test_no_graphons():
    with pytest.raises(ValueError, match="no graphons to draw"):
        graphon_image({})


def rows_of(picture, colour, left, right):
    return (picture[41:212, left:right] == colour).all(2).nonzero()


def test_eigenvalues_fall():
    spectrum = spectral_summary(torch.diag(torch.arange(1, 41, dtype=torch.float64) ** -1.5))
    picture = spectrum_image(spectrum, "title")
    rows, columns = rows_of(picture, (31, 119, 180), 67, 200)  # left of the legend
    assert np.corrcoef(rows, columns)[0, 1] > 0.99  # downwards on the page, straight: a power law


@pytest.mark.parametrize(
    "kernel",
    [torch.zeros(3, 3), torch.eye(4), torch.ones(1, 1), torch.ones(5, 5), 1e-9 * torch.eye(2)],
    ids=["zero", "identity", "one sample", "one eigenvalue", "tiny"],
)
def test_any_kernel_has_a_picture(kernel):
    picture = spectrum_image(spectral_summary(kernel.double()), "")
    assert picture.shape == (260, 400, 3)
    assert picture.std() > 0


@pytest.mark.parametrize(("low", "high"), [(1e-12, 1.0), (3.0, 31.0), (0.2, 2.1), (1e-300, 1e300), (1.1, 11.1)])
def test_logarithmic_axes_have_a_few_labels_inside(low, high):
    labelled, bare = _log_ticks(low, high)
    assert 1 < len(labelled) <= 8
    assert all(low <= tick <= high for tick in [*labelled, *bare])


def test_lines_are_antialiased_and_may_leave_the_picture():
    canvas = Canvas(20, 20, scale=2)
    canvas.line([-5, 30], [-3, 25], 1.5, BLACK)
    canvas.text(30, 0, "cut off", 9, "lm")
    shades = np.unique(np.asarray(canvas.halved().image))
    assert shades.min() == 0
    assert len(shades) > 3
    dashed = Canvas(40, 3)
    dashed.line([0, 40], [1.5, 1.5], 1, BLACK, dash=(6, 4))
    dark = np.asarray(dashed.image)[1, :, 0] < 128
    assert dark.sum() == pytest.approx(24, abs=4)


def test_discs_have_their_colour_and_their_size():
    for colour, rgb in ((BLACK, (0, 0, 0)), (GREY, (102, 102, 102)), (BLUE, (31, 119, 180))):
        canvas = Canvas(20, 20, scale=2)
        canvas.dots([10], [10], 8, colour)
        picture = np.asarray(canvas.halved().image)
        assert picture.shape == (20, 20, 3)
        assert picture[10, 10].tolist() == list(rgb)
        cover = (255 - picture[..., 0].astype(float)).sum() / (255 - rgb[0])
        assert cover == pytest.approx(math.pi * 16, rel=0.1)
