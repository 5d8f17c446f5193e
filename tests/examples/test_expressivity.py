"""The expressivity example, run as a script is, at sizes of seconds."""

import csv

import pytest

pytest.importorskip("sklearn")

SETTING = ["--width", "48", "--layers", "2", "--trials", "2", "--samples", "128", "--sparsities", "0.5", "0.9"]


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    """Folder and table of a run of every method."""
    out = tmp_path_factory.mktemp("expressivity")
    return out, example.main([*SETTING, "--out", str(out)])


def test_everything_is_written(example, finished):
    out, table = finished
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == ["expressivity.csv", "input_density.png"]
    assert len(list(out.glob("cells/*/*.json"))) == 2 * 2 * len(example.METHODS)
    with (out / "expressivity.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(table) == 2 * len(example.METHODS)


def test_numbers_are_in_their_ranges_and_agree_with_the_graphon(finished):
    for row in finished[1]:
        assert row["active_inputs"] + row["cut_off_inputs"] == 64
        assert row["effective_inputs"] <= row["active_inputs"]
        assert 0 <= row["covered_lower"] <= row["covered_upper"] <= 64
        # Of one input the graphon expects what is there; of two, cells hide the spread of the degrees inside a bin.
        assert row["expected_1"] == pytest.approx(row["joined_1"], rel=1e-9)
        assert row["expected_2"] == pytest.approx(row["joined_2"], rel=0.25, abs=0.5)


def test_snip_listens_to_the_centre_and_random_to_everything(finished):
    rows = {(row["method"], row["sparsity"]): row for row in finished[1]}
    assert rows["random", 0.9]["effective_inputs"] > rows["snip", 0.9]["effective_inputs"] + 5
    # Ten of the 64 pixels of the digits are black in nearly all images.
    assert rows["snip", 0.9]["cut_off_inputs"] >= 10


def test_a_second_run_computes_nothing_and_finds_the_same(example, finished, monkeypatch):
    monkeypatch.setattr(example, "compute", lambda *_: pytest.fail("computed again"))
    assert example.main([*SETTING, "--out", str(finished[0])]) == finished[1]
