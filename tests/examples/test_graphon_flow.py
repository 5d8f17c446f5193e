"""The flow example, run as a script is, at sizes of seconds."""

import csv

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

SMALL = {"seeds": 2, "epochs": {"digits": 1, "mnist": 1}, "every": 8, "probe": 16}


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    """Folder and rows of a run of two arms of each kind."""
    out = tmp_path_factory.mktemp("flow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "QUICK", SMALL)
        return out, example.main(["--quick", "--out", str(out)])


def load(example, out, *cell):
    (path,) = out.glob(f"cells/*/{example.Cell('digits', 0.98, *cell).stem}.npz")
    return np.load(path)


def test_everything_is_written(example, finished):
    out, rows = finished
    figures = [f"{name}_s98.png" for name in ("accuracy", "kernels", "paths", "pictures")]
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == sorted([*figures, "graphon_flow.csv"])
    assert len(list(out.glob("cells/*/*.npz"))) == 2 * 13
    with (out / "graphon_flow.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) == 13 + 9 * 4  # arms, and four layers of those that are no tickets
    words = ("case", "method", "start", "layer")
    assert all(np.isfinite(float(v)) for row in table for k, v in row.items() if k not in words and v)


def test_all_arms_have_the_same_number_of_weights_in_each_layer(example, finished):
    out, _ = finished
    counts = []
    for method, start in example.arms(None):
        found = load(example, out, 0, method, start)
        counts.append([int(found[key].sum()) for key in found if key.startswith(("mask/", "start/"))])
    assert all(own == counts[0] for own in counts)


def test_static_masks_stay_and_others_move(example, finished):
    out, _ = finished
    for method, moves in (("static", False), ("set", True), ("rigl", True)):
        found = load(example, out, 1, method, "snip")
        names = [key.removeprefix("mask/") for key in found if key.startswith("mask/")]
        assert any(bool((found[f"mask/{n}"] != found[f"start/{n}"]).any()) for n in names) == moves


def test_tickets_are_made_of_the_last_masks_of_rigl(example, finished):
    out, _ = finished
    rigl = load(example, out, 1, "rigl", "random")
    exact, degrees = (load(example, out, 1, "ticket", kind) for kind in ("exact", "degrees"))
    for key in (key for key in rigl if key.startswith("mask/")):
        assert np.array_equal(exact[key], rigl[key])
        own, others = (f[key].reshape(len(f[key]), -1) for f in (degrees, rigl))
        assert np.array_equal(own.sum(0), others.sum(0))
        assert np.array_equal(own.sum(1), others.sum(1))


def test_masks_of_the_same_degrees_are_random(example):
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[:6, :6] = mask[6:, 6:] = True
    found = [example.same_degrees(mask, seed) for seed in range(40)]
    for other in found:
        assert torch.equal(other.sum(0), mask.sum(0))
        assert torch.equal(other.sum(1), mask.sum(1))
    # All entries are as likely: 480 draws of each row's half, three standard errors.
    assert float(torch.stack(found)[:, :6, :6].float().mean()) == pytest.approx(0.5, abs=0.07)


def test_a_limit_is_of_the_other_seeds(example):
    results = {
        example.Cell("digits", 0.9, seed, "static", "snip"): {"looks/a": np.full((1, 2, 2), float(seed))}
        for seed in range(3)
    }
    assert example.limit(results, "digits", 0.9, "snip", "a", without=0)[0, 0] == 1.5


def test_a_second_run_computes_nothing(example, finished, monkeypatch):
    out, rows = finished
    monkeypatch.setattr(example, "QUICK", SMALL)
    monkeypatch.setattr(example, "compute", lambda *_: pytest.fail("computed again"))
    assert example.main(["--quick", "--out", str(out)]) == rows


def test_one_seed_is_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.parse(["--seeds", "1"])
    assert "at least 2" in capsys.readouterr().err
