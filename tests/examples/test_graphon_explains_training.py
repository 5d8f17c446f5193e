"""The experiment on training and graphons, run as a script is, at sizes of seconds."""

import csv

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

SETTING = ["--quick", "--widths", "32", "--seeds", "2", "--steps", "10", "--methods", "snip", "random", "--draws", "2"]


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    """Folder and outcome of a run."""
    out = tmp_path_factory.mktemp("explains")
    return out, example.main([*SETTING, "--out", str(out)])


def test_a_row_for_each_run_a_table_and_a_picture(example, finished):
    out, table = finished
    assert {path.name for path in out.iterdir()} == {
        "runs_digits_10steps_every5.csv",
        "distances.md",
        "distances_s80_w32.png",
    }
    with (out / "runs_digits_10steps_every5.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * (len(example.ARMS) + 6)  # two methods, two seeds; narrow ones twice
    assert all(len(row["losses"].split()) == 3 for row in rows)  # steps 0, 5 and 10
    assert (out / "distances.md").read_text().count("\n") == 2 + len(example.ARMS) - 1 + 2
    assert all(d.low <= d.median <= d.high for arms in table.values() for d in arms.values())


def test_widths_and_batch_orders_are_what_they_are_called(example, finished):
    curves = example.read(finished[0] / "runs_digits_10steps_every5.csv")
    network = example.Network("snip", 0.8, 32, 0)
    start = {arm: curves[example.Run(network, "adam", arm)][0] for arm in example.ARMS}
    assert start["other batch order"] == start["the network"]
    assert len(set(start.values())) == len(start) - 1
    data = example.split("digits", None, 0)
    assert not set(map(tuple, data[0][0].tolist())) & set(map(tuple, data[1][0].tolist()))
    arms = example.Arms(network, data[0])
    for arm, units in (("redrawn, width x 0.25", 8), ("pruned anew, width x 0.125", 4), ("redrawn: W, 64 bins", 32)):
        net, masks, optimizer = arms.build(arm, "adam")
        assert net[0].out_features == masks["0.weight"].shape[0] == units
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in net.parameters()}


def test_a_second_run_trains_nothing_and_half_a_run_is_finished(example, finished, monkeypatch):
    out, first = finished
    path = out / "runs_digits_10steps_every5.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]))
    trained = []
    original = example.train
    monkeypatch.setattr(example, "train", lambda *a: trained.append(1) or original(*a))
    assert example.main([*SETTING, "--out", str(out)]) == first
    assert len(trained) == 3
    assert [line.split(",")[:5] for line in path.read_text().splitlines()] == [line.split(",")[:5] for line in lines]


def test_distance_of_curves(example):
    curve = torch.tensor([2.0, 1.0, 0.5])
    assert example.log_error(curve, curve) == 0
    assert example.log_error(curve * np.e, curve) == pytest.approx(1)
    assert example.log_error(curve * torch.nan, curve) == torch.inf
    assert example.interval([1.0, 1.0, 1.0]) == (1, 1, 1)
    found = example.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.median == 3
    assert found.low < 3 < found.high
