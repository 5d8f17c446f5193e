"""Path density of inputs against enumeration, relevance against scikit-learn."""

from itertools import pairwise, product

import pytest
import torch

from lightning_graphon.graphon import (
    StepGraphon,
    coordinate_relevance,
    input_path_density,
    layer_graphons,
    path_density,
)


def masks(*sides, density=0.5, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.rand(b, a, generator=source) < density for a, b in pairwise(sides)]


def test_masks_against_counting_every_path():
    layers = masks(3, 4, 5, 2)
    for j in range(3):
        paths = sum(
            bool(layers[0][a, j] and layers[1][b, a] and layers[2][c, b])
            for a, b, c in product(range(4), range(5), range(2))
        )
        assert float(input_path_density(layers)[j]) == pytest.approx(paths / 40, abs=1e-15)


def test_its_mean_is_the_path_density():
    layers = masks(6, 9, 8, 3)
    assert float(input_path_density(layers).mean()) == pytest.approx(path_density(layers), abs=1e-15)
    graphons = list(layer_graphons({str(i): m for i, m in enumerate(layers)}, order="joint", bins=4).values())
    assert float(input_path_density(graphons).mean()) == pytest.approx(path_density(graphons), abs=1e-14)


def test_graphons_with_unequal_measures_against_masks_of_their_blocks():
    """Neurons in two blocks of 2 and 4: the graphon's integral is the masks' sum."""
    first = torch.tensor([[1, 0, 1]] * 2 + [[0, 0, 1]] * 4)
    second = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6])
    measure = torch.tensor([1 / 3, 2 / 3]).double()
    graphons = [
        StepGraphon([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], row_measure=measure),
        StepGraphon([[1.0, 0.0], [1.0, 1.0]], col_measure=measure),
    ]
    torch.testing.assert_close(input_path_density(graphons), input_path_density([first, second]))


def test_taps_count_as_their_mean():
    mask = torch.zeros(2, 3, 2, 2)
    mask[:, 0, 0] = 1
    torch.testing.assert_close(input_path_density([mask]), torch.tensor([0.5, 0.0, 0.0]).double())


def test_sides_that_do_not_fit_and_mixtures():
    with pytest.raises(ValueError, match=r"outputs of layer 0 \(4\) are not the inputs of layer 1 \(5\)"):
        input_path_density([torch.ones(4, 3), torch.ones(2, 5)])
    measure = torch.tensor([0.3, 0.7]).double()
    with pytest.raises(ValueError, match="share positions"):
        input_path_density([StepGraphon([[1.0], [0.5]], row_measure=measure), StepGraphon([[1.0, 0.5]])])
    with pytest.raises(ValueError, match="not a mixture"):
        input_path_density([StepGraphon([[0.5]]), torch.ones(1, 1)])
    with pytest.raises(ValueError, match="at least one layer"):
        input_path_density([])


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16), torch.tensor(labels)


def test_correlation_ratio_against_the_f_test_of_scikit_learn(digits):
    from sklearn.feature_selection import f_classif

    x, labels = digits
    moving = x.var(0) > 0
    F = torch.tensor(f_classif(x[:, moving].numpy(), labels.numpy())[0])
    eta = F * 9 / (F * 9 + len(x) - 10)  # F = (η²/(C-1)) / ((1-η²)/(N-C))
    found = coordinate_relevance(x, labels, "correlation_ratio")
    torch.testing.assert_close(found[moving], eta)
    assert bool((found[~moving] == 0).all())


def test_mean_difference_of_two_equal_classes(digits):
    x = digits[0][:40]
    labels = torch.arange(40) % 2
    expected = (x[::2].mean(0) - x[1::2].mean(0)).abs() / 2
    torch.testing.assert_close(coordinate_relevance(x, labels), expected)
    torch.testing.assert_close(coordinate_relevance(x.reshape(40, 8, 8), labels + 7), expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(torch.zeros(4).long(), "two classes"), (torch.ones(4), "class numbers"), (torch.ones(3).long(), "class numbers")],
)
def test_labels_that_say_nothing(labels, message):
    with pytest.raises(ValueError, match=message):
        coordinate_relevance(torch.eye(4), labels)
    with pytest.raises(ValueError, match="mean_difference"):
        coordinate_relevance(torch.eye(2), torch.tensor([0, 1]), "mean")
