"""The example of three architectures, run as a script is, at sizes of seconds."""

import csv

import pytest
import torch

pytest.importorskip("sklearn")

SETTING = ["--width", "16", "--samples", "5", "--sparsities", "0.5", "--seeds", "1"]
NETWORKS = 3 * (1 + 5)


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("architectures")
    return out, example.main([*SETTING, "--out", str(out)])


def test_everything_is_written(example, finished):
    out, results = finished
    files = sorted(path.name for path in out.iterdir() if path.is_file())
    assert files == ["graphon_ntk_architectures.csv", "graphon_ntk_architectures.png"]
    assert len(results) == len(list(out.glob("cells/*/*.json"))) == NETWORKS
    assert (out / files[1]).stat().st_size > 10_000
    with (out / files[0]).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == NETWORKS * len(example.KERNELS)
    for result in results.values():
        for kernel in example.KERNELS:
            assert 1 <= result[kernel]["effective_rank"] <= 5
            assert 0 < result[kernel]["energy_concentration"] <= 1 + 1e-12


def test_a_second_run_computes_nothing_and_finds_the_same(example, finished, monkeypatch):
    out, first = finished
    monkeypatch.setattr(example, "compute", lambda *_: pytest.fail("computed again"))
    assert example.main([*SETTING, "--out", str(out)]) == first


@pytest.mark.parametrize("name", ["CNN", "ResNet", "transformer"])
def test_magnitude_keeps_the_same_share_of_every_layer(example, name):
    batch = torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)
    net, masks = example.masked_network(example.Cell(name, "magnitude", 0.5, 0), 16, batch)
    assert net(batch[0]).shape == (4, 10)
    assert all(float(mask.float().mean()) == pytest.approx(0.5, abs=0.01) for mask in masks.values())


def test_patches_are_squares_of_pixels(example):
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    tokens = example.Patches()(image)
    assert torch.equal(tokens[0, 1], image[0, 0, :4, 4:].flatten())
    assert torch.equal(tokens[0, 2], image[0, 0, 4:, :4].flatten())


def test_attention_has_no_drift(example):
    found = {example.theory(example.Cell(name, "snip", 0.5, 0)) for name in ("CNN", "ResNet")}
    assert (found, example.theory(example.Cell("transformer", "snip", 0.5, 0))) == ({"drift"}, "energy")


def test_quick_changes_defaults_only(example):
    assert example.parse(["--quick"]).width < example.parse([]).width
    assert example.parse(["--quick", "--width", "7"]).width == 7
