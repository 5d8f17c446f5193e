"""The spectra example, run as a script is, at sizes of seconds."""

import csv
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
SETTING = ["--width", "32", "--samples", "24", "--batch", "64", "--sparsities", "0.5", "0.9", "--seeds", "2"]
NETWORKS = 2 * (1 + 2 * 5)  # seeds, dense and two sparsities of five methods


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    """Folder and outcome of a run of every method."""
    out = tmp_path_factory.mktemp("spectra")
    return out, example.main([*SETTING, "--out", str(out)])


def test_everything_is_written(example, finished):
    out, results = finished
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == ["ntk_spectra.csv", "ntk_spectra.png"]
    assert len(results) == len(list(out.glob("cells/*/*.json"))) == NETWORKS
    assert not list(out.glob("cells/*/*.part"))
    assert (out / "ntk_spectra.png").stat().st_size > 10_000
    with (out / "ntk_spectra.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == NETWORKS / 2 * len(example.KERNELS)
    assert {row["seeds"] for row in rows} == {"2"}
    names = ("method", "kernel")
    assert all(math.isfinite(float(value)) for row in rows for key, value in row.items() if key not in names)


def test_metrics_are_in_their_ranges(example, finished):
    for result in finished[1].values():
        for kernel in example.KERNELS:
            numbers = result[kernel]
            assert numbers["effective_rank"] >= 1
            assert numbers["spectral_gap"] >= 1
            assert 0 < numbers["energy_concentration"] <= 1 + 1e-12
            assert numbers["lambda_min"] > -1e-9 * numbers["lambda_max"]


def test_pruned_networks_have_the_sparsity_asked_for_and_dense_ones_no_masks(finished):
    for cell, result in finished[1].items():
        assert (cell.method == "dense") == (result["density_of_masks"] == [])
        if cell.method != "dense":
            sizes = [32 * 64, 32 * 32, 32 * 32, 32 * 32, 10 * 32]
            kept = sum(d * n for d, n in zip(result["density_of_masks"], sizes, strict=True))
            assert 1 - kept / sum(sizes) == pytest.approx(cell.sparsity, abs=1e-3)


def test_a_second_run_computes_nothing_and_finds_the_same(example, finished, monkeypatch):
    out, first = finished
    monkeypatch.setattr(example, "compute", lambda *_: pytest.fail("computed again"))
    assert example.main([*SETTING, "--out", str(out)]) == first


def test_another_setting_does_not_reuse_networks(example, finished, monkeypatch, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "copy")
    asked = []
    monkeypatch.setattr(example, "compute", lambda cell, args: asked.append(cell) or {})
    example.run(example.parse([*SETTING, "--out", str(out), "--batch", "65"]), example.Console(quiet=True))
    assert len(asked) == NETWORKS


def test_the_graphon_kernel_of_a_dense_network_has_the_spectrum_of_the_network(example):
    """Kernels of single networks scatter: each of four layers adds a relative variance of the order 1 / width.

    That is sqrt(4 / 256), about an eighth, for one network at width 256; tolerated is twice that.
    """
    args = example.parse(["--width", "256", "--samples", "32"])
    result = example.compute(example.Cell("dense", 0.0, 0), args)
    for kernel in ("density", "energy", "drift"):
        for metric in example.METRICS:
            assert result[kernel][metric] == pytest.approx(result["empirical"][metric], rel=0.25), (kernel, metric)


def test_the_plain_network_computes_what_the_pruned_one_does(example):
    args = example.parse(SETTING)
    data, cell = example.samples(args, 1), example.Cell("random", 0.9, 1)
    plain, masks = example.masked_network(cell, data, args)
    torch.manual_seed(1)
    scaled = example.network(64, 32, example.LAYERS, "ntk")
    masks.apply_(scaled)
    masks.apply_(plain)
    torch.testing.assert_close(plain(data.probe).float(), scaled(data.probe.float()), rtol=1e-4, atol=1e-6)


def test_random_masks_know_nothing_of_the_weights(example):
    args = example.parse([*SETTING, "--width", "128"])
    net, masks = example.masked_network(example.Cell("random", 0.9, 0), example.samples(args, 0), args)
    for name, weight in net.named_parameters():
        kept = weight.detach()[masks[name]] * (weight.shape[1] / 2) ** 0.5
        # The mean of n standard normal numbers scatters by 1 / sqrt(n), that of their squares by sqrt(2 / n).
        assert abs(float(kept.mean())) < 4 / len(kept) ** 0.5
        assert abs(float(kept.square().mean()) - 1) < 4 * (2 / len(kept)) ** 0.5


def test_probe_and_scored_images_never_overlap(example):
    args = example.parse(SETTING)
    first, second = example.samples(args, 0), example.samples(args, 1)
    assert torch.equal(first.probe, second.probe)
    assert not torch.equal(first.batch[0], second.batch[0])
    assert (torch.cdist(first.probe.float(), first.batch[0]) > 0).all()


def test_paper_changes_defaults_only(example):
    whole = example.parse(["--paper"])
    assert (whole.width, whole.samples, min(whole.sparsities), max(whole.sparsities)) == (1024, 1024, 0.5, 0.95)
    part = example.parse(["--paper", "--sparsities", "0.9", "0.8", "--seeds", "1"])
    assert (part.sparsities, part.seeds, part.width) == ([0.8, 0.9], 1, whole.width)


def test_a_spectrum_needs_five_samples(example, capsys):
    with pytest.raises(SystemExit):
        example.parse(["--samples", "4"])
    assert "at least 5" in capsys.readouterr().err


def test_the_code_of_the_page_runs():
    """And its Graphon NTK with drift is close to the exact kernel of the pruned network, as theory-ntk.md says."""
    text, names = (ROOT / "docs" / "tutorials" / "kernels.md").read_text(encoding="utf-8"), {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "kernels.md", "exec"), names)  # noqa: S102  (our own text)
    theory, exact = names["theory"], names["exact"]
    assert float((theory - exact).norm() / exact.norm()) < 0.3  # table of that page: 0.12 to 0.25 at these widths
    torch.testing.assert_close(names["operator"].trace(), 10 * float(exact.trace()))
    # Lanczos against all eigenvalues of the same operator.
    torch.testing.assert_close(names["values"], torch.linalg.eigvalsh(names["operator"].to_dense()).flip(0)[:5])
