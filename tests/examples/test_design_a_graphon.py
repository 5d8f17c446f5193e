"""The design example, run as a script is, at sizes of seconds."""

import csv

import pytest
import torch

pytest.importorskip("sklearn")

SETTING = [
    *("--width", "24", "--epochs", "3", "--train", "200", "--probe", "24", "--positions", "3", "--steps", "5"),
    *("--sparsities", "0.5", "0.8", "--seeds", "2"),
]


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    """Folder and outcome of a run of all methods."""
    out = tmp_path_factory.mktemp("design")
    return out, *example.main([*SETTING, "--out", str(out)])


def test_everything_is_written(example, finished):
    out, designs, results = finished
    names = ["design_digits_inputs.png", "design_digits_kept.csv", "design_digits_kept.png"]
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == names
    assert len(designs) == 4 * 2
    assert len(results) == len(example.METHODS) * 2 * 2
    with (out / names[1]).open() as file:
        rows = list(csv.DictReader(file))
    assert [len(rows), rows[0]["method"]] == [len(results), "random"]
    assert all((out / name).stat().st_size > 10_000 for name in names if name.endswith("png"))


def test_all_methods_keep_the_same_number_of_weights(example, finished):
    sizes = torch.tensor([64 * 24, 24 * 24, 24 * 10]).double()
    for cell, result in finished[2].items():
        kept = float(torch.tensor(result["density"]).double() @ sizes)
        assert kept == pytest.approx((1 - cell.sparsity) * float(sizes.sum()), abs=0.51)


def test_masks_that_are_drawn_share_their_layer_densities(finished):
    """So that designs are compared in where the weights are, not in how many each layer has."""
    for cell, result in finished[2].items():
        if cell.method not in ("snip", "synflow"):
            same = finished[2][cell._replace(method="random")]
            assert result["density"] == pytest.approx(same["density"], abs=1e-12)


def test_every_target_was_improved_at_the_densities_asked_for(example, finished):
    args = example.parse(SETTING)
    for cell, design in finished[1].items():
        assert max(design["history"]) > design["history"][0]
        asked = example.layer_densities(args, cell.sparsity, 64)
        means = [float(torch.tensor(values).double().mean()) for values in design["values"]]
        assert means == pytest.approx(asked, abs=1e-6)  # read back from float32


def test_hubs_have_their_densities_and_prefer_no_input(example):
    first, second, last = example.hubs([0.1, 0.2, 0.3], 4)
    assert [g.density for g in (first, second, last)] == pytest.approx([0.1, 0.2, 0.3])
    assert first.shape[1] == last.shape[0] == 1
    assert float(second.values[0, 0]) > float(second.values[3, 3])


def test_a_second_run_computes_nothing(example, finished, monkeypatch):
    for name in ("compute", "design"):
        monkeypatch.setattr(example, name, lambda *_: pytest.fail("computed again"))
    assert example.main([*SETTING, "--out", str(finished[0])]) == finished[1:]


def test_losses_are_taken_from_the_start_and_the_early_one_is_the_last_until_step_50(example):
    assert example.early_loss({"losses": {"0": 3.0, "35": 2.0, "50": 1.0, "75": 0.5}}) == 1.0
    assert example.early_loss({"losses": {"0": 3.0, "10": 2.0}}) == 2.0


def test_weights_can_stay_as_drawn(example):
    args = example.parse([*SETTING, "--init", "drawn"])
    data = example.samples(args)
    drawn, kept = (example.compute(example.Cell("random", 0.8, 0), a, data, {}) for a in (args, example.parse(SETTING)))
    assert drawn["density"] == kept["density"]
    assert drawn["losses"] != kept["losses"]


def test_a_probe_that_takes_gigabytes_is_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.parse(["--probe", "5000"])
    assert "gigabytes" in capsys.readouterr().err
