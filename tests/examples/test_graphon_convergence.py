"""The convergence example, run as a script is, at sizes of seconds."""

import csv
import shutil

import numpy as np
import pytest

from lightning_graphon.graphon import constant

pytest.importorskip("sklearn")

WIDTHS, SETTING = (32, 64), ["--widths", "32", "64", "--layers", "3", "--trials", "2", "--samples", "64", "--bins", "8"]


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    """Folder and outcome of a run of every method."""
    out = tmp_path_factory.mktemp("convergence")
    return out, example.main([*SETTING, "--out", str(out)])


def test_everything_is_written(example, finished):
    out, _ = finished
    pictures = ["distances_l3.png", "pictures_s80_l3.png", "taxonomy_l3.png"]
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == sorted([*pictures, "distances.csv"])
    assert len(list(out.glob("cells/*/*.npz"))) == 2 * len(WIDTHS) * len(example.METHODS)
    assert not list(out.glob("cells/*/*.part"))
    with (out / "distances.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(WIDTHS) * len(example.METHODS)  # two square masks in a network of three hidden layers
    assert all(np.isfinite(float(value)) for row in rows for key, value in row.items() if key != "method")


def test_distances_are_finite_and_the_bounds_of_the_cut_norm_are_in_order(finished):
    for points in finished[1].values():
        for point in points.values():
            for numbers in (point.distance, point.floor):
                assert numbers.shape == (2, 2, 3)
                assert np.isfinite(numbers).all()
                assert (numbers[..., 1] > 0).all()
                assert (numbers[..., 1] <= numbers[..., 2] * (1 + 1e-9)).all()
                assert (numbers[..., 1] <= numbers[..., 0]).all()


def test_random_masks_are_homogeneous_and_those_of_data_and_flow_are_not(example, finished):
    words = {method: example.verdict(points)[0] for (_, _, method), points in finished[1].items()}
    homogeneous = {method for method, word in words.items() if word == "homogeneous"}
    assert homogeneous == {"random", "magnitude"}


def test_random_masks_are_as_far_from_their_limit_as_chance_says(finished):
    points = finished[1][0.8, 3, "random"]
    for point in points.values():
        # Two networks of two masks each: their mean distance has a spread of about a tenth.
        assert point.distance[..., 0].mean() == pytest.approx(point.floor[..., 0].mean(), rel=0.3)


def test_a_second_run_computes_nothing_and_finds_the_same(example, finished, monkeypatch):
    out, first = finished
    monkeypatch.setattr(example, "compute", lambda *_: pytest.fail("computed again"))
    second = example.main([*SETTING, "--out", str(out)])
    for key, points in first.items():
        for width, point in points.items():
            np.testing.assert_array_equal(second[key][width].distance, point.distance)


def test_another_setting_does_not_reuse_networks(example, finished, monkeypatch, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "copy")
    asked = []
    monkeypatch.setattr(example, "compute", lambda cell, args: asked.append(cell) or {"measure": np.ones(1)})
    args = example.parse([*SETTING, "--out", str(out), "--init", "he"])
    example.run(args, example.Console(quiet=True))
    assert len(asked) == 2 * len(WIDTHS) * len(example.METHODS)


def test_the_widest_networks_are_compared_with_the_others_not_with_themselves(example):
    a, b, c = (constant(p) for p in (0.2, 0.4, 0.3))
    found = example.distances({10: [c, c], 20: [a, b]})
    assert [round(d[0], 9) for d in found[10]] == [0, 0]
    assert [round(d[0], 9) for d in found[20]] == [0.2, 0.2]


def test_paper_changes_defaults_only(example):
    whole = example.parse(["--paper"])
    assert (whole.widths, whole.sparsities, whole.layers) == ([100, 500, 1000, 2000], [0.7, 0.8, 0.9], [4, 5])
    assert whole.bins == 25  # divides every width
    part = example.parse(["--paper", "--layers", "4", "--widths", "500", "100"])
    assert (part.widths, part.layers, part.trials) == ([100, 500], [4], whole.trials)


@pytest.mark.parametrize("wrong", [["--trials", "1"], ["--layers", "1"], ["--widths", "64", "64"]])
def test_settings_without_a_distance_are_refused(example, wrong, capsys):
    with pytest.raises(SystemExit):
        example.parse(wrong)
    assert "at least 2" in capsys.readouterr().err


def test_ntk_and_he_networks_are_alike_but_for_the_place_of_the_scale(example):
    example.torch.manual_seed(0)
    x = example.torch.randn(64, 100)
    outputs = {init: example.network(100, 400, 3, init)(x).std().item() for init in ("ntk", "he")}
    # One draw of 400 neurons a layer: the scale of the outputs is certain to about a tenth.
    assert outputs["ntk"] == pytest.approx(outputs["he"], rel=0.4)
    assert example.network(100, 400, 3, "ntk")[2].weight.std().item() == pytest.approx(1, rel=0.02)
    assert example.network(100, 400, 3, "he")[2].weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
