"""The example of predicted limits, run as a script is, at sizes of seconds."""

import csv
import math

import pytest
import torch

pytest.importorskip("sklearn")

SETTING = ["--sides", "8", "16", "--trials", "2", "--samples", "128", "--bins", "16"]


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    """Folder and table of a run of every method."""
    out = tmp_path_factory.mktemp("limits")
    return out, example.main([*SETTING, "--out", str(out)])


def of(table, method, size):
    return next(row for row in table if (row["method"], row["size"]) == (method, size))


def test_everything_is_written(example, finished):
    out, table = finished
    names = ["distances.png", "pictures.png", "predicted_limits.csv"]
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == names
    assert len(list(out.glob("cells/*/*.npz"))) == 2 * 2 * len(example.METHODS)
    with (out / "predicted_limits.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(table) == 2 * len(example.METHODS)
    empty = {(row["method"], key) for row in written for key, value in row.items() if value == ""}
    fit = ("l2_fitted", "cut_fitted", "explained", "noise_ks")
    assert empty == {("synflow-100", key) for key in fit}  # 100 rounds are not one-shot: nothing is fitted
    words = ("method", "verdict")
    assert all(math.isfinite(float(v)) for row in written for k, v in row.items() if k not in words and v != "")


def test_masks_are_as_far_from_their_predicted_limit_as_chance_says(example, finished):
    for method in example.METHODS:
        row = of(finished[1], method, 256)
        # Four draws of chance for each of two networks: measured ratios of 0.96 to 1.05 over the methods.
        assert float(row["l2_known"]) == pytest.approx(float(row["l2_chance"]), rel=0.2)
        assert float(row["l2_placed"]) == pytest.approx(float(row["l2_placed_chance"]), rel=0.2)
        assert float(row["l2_known"]) < 0.6 * float(of(finished[1], method, 64)["l2_known"]) or method.startswith(
            ("px", "synflow")
        )


def test_chance_knows_that_units_of_one_degree_differ(example):
    # A quarter of the rows has few weights where the others have many, and their degrees do not tell.
    kind = torch.where(torch.arange(512) % 4 == 0, -1.0, 1.0)[:, None]
    rows, tilt = torch.linspace(0.7, 1, 512)[:, None], torch.linspace(-1, 1, 512)
    probabilities = (rows * (0.5 + 0.45 * kind * tilt)).double()
    mask = torch.rand(512, 512, generator=torch.Generator().manual_seed(1)) < probabilities
    found = example.graphons(mask, probabilities, seed=0, bins=16)
    limit = example.StepGraphon(found["known"])
    of_cells = example.estimate_graphon(limit.sample((512, 512), seed=0), 16).values

    def distance(values):
        return float((values - found["known"]).square().mean((-2, -1)).sqrt().mean())

    # Over ten masks: 0.81 to 1.15 times chance, 1.8 to 2.7 times what the limit's cells give.
    assert distance(found["found"]) == pytest.approx(distance(found["drawn"]), rel=0.3)
    assert distance(found["found"]) > 1.5 * distance(of_cells)


def test_the_taxonomy_is_that_of_the_paper(finished):
    verdicts = {row["method"]: row["verdict"] for row in finished[1] if row["size"] == 256}
    homogeneous = {method for method, verdict in verdicts.items() if verdict == "homogeneous"}
    assert homogeneous == {"random", "magnitude"}


def test_a_second_run_computes_nothing_and_finds_the_same(example, finished, monkeypatch):
    monkeypatch.setattr(example, "compute", lambda *_: pytest.fail("computed again"))
    for picture in ("draw_distances", "draw_pictures"):  # seconds, and seen above
        monkeypatch.setattr(example, picture, lambda *_: None)
    assert example.main([*SETTING, "--out", str(finished[0])]) == finished[1]


def test_outputs_of_untrained_networks_vanish_as_they_widen(example):
    spread = []
    for size in (64, 1024):
        torch.manual_seed(0)
        spread.append(float(example.network(size)(torch.ones(1, size)).detach().std()))
    # 1 / sqrt(width), of ten outputs: a factor of four, known to about a quarter.
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.6)


def test_inputs_are_the_same_images_ever_finer(example):
    args = example.parse(SETTING)
    coarse, fine = (example.batch(example.Cell("snip", side, 0), args) for side in (8, 16))
    assert torch.equal(coarse[1], fine[1])
    blocks = fine[0].view(-1, 8, 2, 8, 2).mean((2, 4)).flatten(1)
    # Bilinear interpolation blurs over a neighbour: measured 0.99.
    assert float(torch.corrcoef(torch.stack([coarse[0].flatten(), blocks.flatten()]))[0, 1]) > 0.97


@pytest.mark.parametrize("wrong", [["--trials", "1"], ["--sides", "8", "12"]])
def test_settings_that_cannot_be_compared_are_refused(example, wrong, capsys):
    with pytest.raises(SystemExit):
        example.parse(wrong)
    assert "multiples of 8" in capsys.readouterr().err


def test_paper_changes_defaults_only(example):
    whole = example.parse(["--paper"])
    assert (whole.sides, whole.trials) == ([8, 16, 32, 64], 3)
    assert example.parse(["--paper", "--sides", "16", "8"]).sides == [8, 16]
