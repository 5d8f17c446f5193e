"""The generalisation example, run as a script is, at sizes of seconds."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
SETTING = [
    *("--width", "24", "--samples", "30", "--test-samples", "40", "--epochs", "2"),
    *("--densities", "0.5", "0.02", "--seeds", "2", "--methods", "random", "snip"),
]


@pytest.fixture(scope="module", params=["ten", "binary"])
def finished(example, request, tmp_path_factory):
    """Folder and outcome of a run."""
    out = tmp_path_factory.mktemp("generalisation")
    return out, request.param, example.main([*SETTING, "--task", request.param, "--out", str(out)])


def test_everything_is_written(finished):
    out, task, results = finished
    names = [f"generalisation_digits_{task}.{end}" for end in ("csv", "png")]
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == names
    assert len(results) == len(list(out.glob("cells/*/*.json"))) == 2 * (1 + 2 * 2)
    with (out / names[0]).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(results)
    assert (out / names[1]).stat().st_size > 10_000


def test_numbers_are_in_their_ranges(example, finished):
    for result in finished[2].values():
        assert -1 <= result["relevance"] <= 1
        for kernel in example.KERNELS:
            numbers = result[kernel]
            assert numbers["bound"] > 0
            assert 0 <= numbers["alignment"] <= 1
            assert 0 <= numbers["ridge_error"] <= 1
            assert numbers["scale"] >= 0
            # One formula at two scales; both are inf, or their ratio is known.
            if math.isfinite(numbers["bound"]):
                ratio = numbers["literal"] / numbers["bound"]
                assert ratio == pytest.approx(1 / (2 * numbers["scale"]) ** 0.5, rel=1e-6)


def test_a_second_run_computes_nothing(example, finished, monkeypatch):
    out, task, first = finished
    monkeypatch.setattr(example, "compute", lambda *_: pytest.fail("computed again"))
    assert example.main([*SETTING, "--task", task, "--out", str(out)]) == first


def test_a_network_without_paths_is_an_infinite_bound_and_the_error_of_a_guess(example):
    args = example.parse(SETTING)
    data = example.samples(args, 0)
    nothing = example.of_kernel(torch.zeros(30, 30), torch.zeros(40, 30), data)
    assert nothing["bound"] == nothing["literal"] == float("inf")
    assert 0.5 < nothing["ridge_error"] < 1


def test_training_and_test_images_never_overlap_and_have_unit_length(example):
    data = example.samples(example.parse(SETTING), 1)
    assert float(torch.cdist(data.x, data.x_test).min()) > 0
    torch.testing.assert_close(data.x.norm(dim=1), torch.ones(30))


def test_the_dense_network_is_dense_and_kept_weights_have_the_variance_of_he(example):
    args = example.parse(SETTING)
    data = example.samples(args, 0)
    for cell in (example.Cell("dense", 1.0, 0), example.Cell("random", 0.5, 0)):
        net, masks = example.masked_network(cell, data, args)
        assert masks.sparsity == pytest.approx(1 - cell.density, abs=1e-3)
        for weight in net.parameters():
            assert float(weight.detach().square().sum(1).mean()) == pytest.approx(2, rel=1e-5)


def test_densities_are_fractions(example, capsys):
    with pytest.raises(SystemExit):
        example.parse(["--densities", "10"])
    assert "between 0 and 1" in capsys.readouterr().err


def test_the_code_of_the_page_runs():
    text, names = (ROOT / "docs" / "how-to" / "design-graphons.md").read_text(encoding="utf-8"), {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "design-graphons.md", "exec"), names)  # noqa: S102  (our own text)
    assert names["bound"].vacuous
    assert names["predicted"].shape == (50, 10)
    assert names["masks"].sparsity == pytest.approx(0.9, abs=1e-4)
    assert names["design"].value > names["design"].history[0]
