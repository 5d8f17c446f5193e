"""The null of masked weights against sampled matrices, closed forms, and layers with and without planted structure."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_graphon.graphon import weight_spectrum
from lightning_graphon.graphon.spectra.profile import VarianceProfile
from lightning_graphon.plots import plot_weight_spectrum
from lightning_graphon.pruning import prune
from tests.helpers.modules import digits


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def profile(m: int, n: int, drift: float = 0.0, kind: str = "hubs") -> VarianceProfile:
    """Two groups on each side; hubs with ten times the variance, and rows and columns that differ inside groups."""
    groups = [(torch.arange(side) * 2 // side) for side in (m, n)]
    interaction = torch.tensor({"flat": [[1.0, 1.0], [1.0, 1.0]], "hubs": [[10.0, 2.0], [1.0, 0.5]]}[kind]).double()
    factors = [
        torch.linspace(0.5, 1.5, side).double() if kind == "hubs" else torch.ones(side).double() for side in (m, n)
    ]
    means = torch.zeros(2, 2).double()
    means[1, 0] = drift
    return VarianceProfile(*factors, *groups, interaction, means)


def sample(law: VarianceProfile, seed: int) -> Tensor:
    variance = torch.outer(law.rows, law.cols) * law.interaction[law.row_groups][:, law.col_groups]
    return variance.sqrt() * normal(seed, *variance.shape) + law.drift[law.row_groups][:, law.col_groups]


@pytest.mark.parametrize(("m", "n"), [(100, 100), (60, 240)])
def test_equal_variances_give_marchenko_and_pastur(m: int, n: int) -> None:
    law = profile(m, n, kind="flat")
    edge = law.edge()
    assert edge == pytest.approx(math.sqrt(m) + math.sqrt(n), rel=2e-4)
    points = torch.linspace(0.6, 0.9, 4).double() * edge
    low, high = (math.sqrt(n) - math.sqrt(m)) ** 2, edge**2
    squares = points.square()
    expected = ((high - squares) * (squares - low).clamp(min=0)).sqrt() / (math.pi * m * points)
    # The resolution is two thousandths of the edge.
    torch.testing.assert_close(law.density(points, edge), expected, rtol=2e-2, atol=1e-4)


def test_the_bulk_of_sampled_matrices() -> None:
    law = profile(300, 400)
    edge = law.edge()
    values = torch.cat([torch.linalg.svdvals(sample(law, seed)) for seed in range(4)])
    grid = torch.linspace(0, edge, 401).double()[1:]
    mass = law.density(grid, edge).flip(0).cumsum(0).flip(0) * float(grid[1] - grid[0])
    for start in (0.2, 0.4, 0.6, 0.8):
        at = int((grid / edge > start).nonzero()[0])
        found = float((values > grid[at]).double().mean())
        assert found == pytest.approx(
            float(mass[at]), abs=0.01
        )  # rigid: 1200 values move by less than one in a hundred
    largest = [float(torch.linalg.svdvals(sample(law, seed))[0]) for seed in range(4)]
    assert all(0.97 * edge < value < 1.02 * edge for value in largest)  # n^(-2/3) is 0.02


def test_outliers_of_the_mean() -> None:
    law = profile(300, 400, drift=0.6)
    (predicted,) = law.drift_spikes(law.edge())
    found = [float(torch.linalg.svdvals(sample(law, seed))[0]) for seed in range(4)]
    assert sum(found) / 4 == pytest.approx(predicted, rel=0.01)
    assert predicted > 1.2 * law.edge()
    assert profile(300, 400, drift=0.05).drift_spikes(law.edge()) == []  # too weak to leave the bulk


def test_an_outlier_of_equal_variances_is_at_its_closed_form() -> None:
    """θ of a rank-one mean moves to √((θ² + m)(θ² + n)) / θ (Benaych-Georges and Nadakuditi 2012)."""
    m, n, mean = 100, 200, 0.25
    law = profile(m, n, kind="flat")
    law = VarianceProfile(law.rows, law.cols, law.row_groups, law.col_groups, law.interaction, law.interaction * mean)
    theta = mean * math.sqrt(m * n)
    assert law.drift_spikes(law.edge()) == pytest.approx([math.sqrt((theta**2 + m) * (theta**2 + n)) / theta], rel=1e-3)


@pytest.mark.parametrize("kind", ["flat", "hubs"])
def test_no_spikes_in_matrices_of_independent_entries(kind: str) -> None:
    """The estimated edge fluctuates too: of 40 matrices of each kind one, with hubs, has a spike by chance."""
    spectra = [weight_spectrum(sample(profile(200, 300, kind=kind), seed), resolution=1) for seed in range(5)]
    assert sum(len(spectrum.spikes) for spectrum in spectra) <= 1
    assert all(len(spectrum.drift_outliers) == 0 for spectrum in spectra)


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_few_weights_for_each_unit_are_no_structure(density: float) -> None:
    mask = normal(9, 400, 400).abs() < {0.05: 0.0627, 0.2: 0.2533}[density]
    assert len(weight_spectrum(normal(1, 400, 400), mask).spikes) == 0


def test_planted_structure_is_found_and_a_mean_is_told_apart() -> None:
    noise = sample(profile(200, 300), 3)
    edge = weight_spectrum(noise).edge
    direction = torch.outer(normal(5, 200), normal(6, 300))
    direction /= torch.linalg.matrix_norm(direction, 2)
    spectrum = weight_spectrum(noise + 2 * edge**0.5 * direction)
    assert len(spectrum.spikes) == 1
    assert float(spectrum.spikes[0]) > 3 * edge
    weak = weight_spectrum(noise + 0.1 * edge**0.5 * direction)  # inside the bulk: cannot be seen
    assert len(weak.spikes) == 0
    moved = weight_spectrum(normal(7, 200, 300) + 0.4)
    assert len(moved.drift_outliers) == 1
    assert len(moved.spikes) == 0
    assert float(moved.eigenvalues[0]) == pytest.approx(float(moved.drift_outliers[0]), rel=0.03)


@pytest.mark.parametrize("method", ["random", "snip", "synflow"])
def test_untrained_layers_have_none_though_they_leave_marchenko_and_pasturs_law(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    masks = prune(net, method, sparsity=0.9, batches=[digits(256)])
    weight, mask = net[2].weight.detach(), masks["2.weight"]
    spectrum = weight_spectrum(weight, mask)
    assert len(spectrum.spikes) == 0
    equal = float((weight * mask).double().square().mean()) * (2 * math.sqrt(256)) ** 2
    assert (int((spectrum.eigenvalues > equal).sum()) > 10) == (method != "random")


def test_transposed_and_with_taps_it_is_the_same() -> None:
    X = sample(profile(40, 60), 0)
    wide, tall, taps = weight_spectrum(X), weight_spectrum(X.T), weight_spectrum(X.unflatten(1, (15, 2, 2)))
    assert wide.edge == pytest.approx(tall.edge) == pytest.approx(taps.edge)
    torch.testing.assert_close(wide.eigenvalues, tall.eigenvalues)


def test_arguments_and_picture() -> None:
    with pytest.raises(ValueError, match="mask must have the weight's shape"):
        weight_spectrum(torch.ones(3, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="no entry that is not zero"):
        weight_spectrum(torch.zeros(3, 3))
    figure = plot_weight_spectrum(weight_spectrum(normal(0, 50, 60) + 0.5), "fc1")
    (panel,) = figure.axes
    assert panel.get_title() == "fc1"
    assert any("mean" in line.get_label() for line in panel.get_lines())
