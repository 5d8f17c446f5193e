"""The loss decay example, run as a script is, at sizes of seconds."""

import csv
import importlib
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from lightning_graphon.ntk import empirical_ntk
from lightning_graphon.pruning import prune

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTING = [
    "--width", "16", "--sparsities", "0.8", "--methods", "random", "snip", "--seeds", "1", "--steps", "60",
    "--batch", "32", "--probe", "16",
]  # fmt: skip
NETWORKS = 1 + 2


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXAMPLES), *sys.path])  # as Python does for a script
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    """Folder and outcome of a run."""
    out = tmp_path_factory.mktemp("decay")
    return out, example.main([*SETTING, "--out", str(out)])


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_everything_is_written(example, finished):
    out, results = finished
    assert len(results) == len(list(out.glob("cells/*/*.json"))) == NETWORKS
    for name in ("curves", "correlations", "scatter"):
        assert (out / f"loss_decay_{name}.png").stat().st_size > 10_000
    networks = rows(out / "loss_decay_networks.csv")
    assert len(networks) == 2 * NETWORKS
    names = ("method", "optimizer", "invalid_from")  # nothing where the prediction held to the end
    assert all(math.isfinite(float(value)) for row in networks for key, value in row.items() if key not in names)
    correlations = rows(out / "loss_decay_correlations.csv")
    kernels, free = 4 * (7 + 2), 3
    assert len(correlations) == 2 * 2 * (kernels + free)
    assert all(-1 <= float(row["low"]) <= float(row["high"]) <= 1 for row in correlations)


def test_predictions_begin_at_the_observed_loss(finished):
    for result in finished[1].values():
        for optimizer, start in (("sgd", 0), ("adam", 10)):
            curves = result[optimizer]["curves"]
            at = curves["step"].index(start)
            # The prediction works in float64 on outputs in float32, as the observed loss does.
            assert curves["predicted"][at] == pytest.approx(curves["observed"][at], rel=1e-6)
            assert curves["predicted"][:at] == [None] * at
            assert curves["step"][-1] == 60
            assert curves["refreshed"][-1] is not None


def test_both_optimizers_train_the_same_masked_network(finished):
    for cell, result in finished[1].items():
        first = [result[optimizer]["curves"]["observed"][0] for optimizer in ("sgd", "adam")]
        assert first[0] == first[1]
        assert result["metrics"]["density"] == pytest.approx(1 - cell.sparsity, abs=1e-3)


def test_a_second_run_computes_nothing_and_finds_the_same(example, finished, monkeypatch):
    out, first = finished
    monkeypatch.setattr(example, "compute", lambda *_: pytest.fail("computed again"))
    assert example.run(example.parse([*SETTING, "--out", str(out)]), example.Console(quiet=True)) == first


def test_another_learning_rate_does_not_reuse_networks(example, finished, monkeypatch):
    asked = []
    monkeypatch.setattr(example, "compute", lambda cell, args: asked.append(cell) or {})
    args = example.parse([*SETTING, "--out", str(finished[0]), "--sgd-rate", "0.07"])
    example.run(args, example.Console(quiet=True))
    assert len(asked) == NETWORKS


def test_measures_of_an_exponential(example):
    step = np.arange(0.0, 201.0, 10.0)
    found = example.decay({"step": step.tolist(), "observed": (2.3 * np.exp(-0.01 * step)).tolist()})
    assert found == pytest.approx({"rate": 0.01, "mean_fall": 1.0, "fall": 2.0})


@pytest.fixture
def pruned():
    """A small network, its masks, and samples that are all there is to train on."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 2048, bias=False), nn.ReLU(), nn.Linear(2048, 3, bias=False))
    inputs, labels = torch.randn(12, 8), torch.arange(12) % 3
    masks = prune(net, "random", sparsity=0.5, seed=1)
    return net, masks, load("loss_decay_metrics").Sample(inputs, labels, 12)


def test_predicted_fall_is_that_of_real_training(pruned):
    net, masks, sample = pruned
    said = load("loss_decay_metrics").kernel_metrics(net, masks, sample, rate=0.002, steps=30)["exact predicted_fall"]
    masks.apply_(net)
    losses = []
    for _ in range(31):
        loss = F.cross_entropy(net(sample.inputs), sample.labels)
        losses.append(loss.item())
        slopes = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for parameter, slope, mask in zip(net.parameters(), slopes, masks.values(), strict=True):
                parameter -= 0.002 * slope * mask
    fall = math.log(losses[0] / losses[-1])
    # The outputs' own kernels differ from their mean by relative (2 / width)^(1/2), 3 %; and they move a little.
    assert fall > 0.1
    assert said == pytest.approx(fall, rel=0.05)


def test_first_speed_of_adam_is_that_of_its_kernel(pruned):
    net, masks, sample = pruned
    metrics = load("loss_decay_metrics").kernel_metrics(net, masks, sample, rate=0.01, steps=1)
    masks.apply_(net)
    outputs = net(sample.inputs)
    loss = F.cross_entropy(outputs, sample.labels)
    g, *slopes = torch.autograd.grad(loss, [outputs, *net.parameters()])
    diagonal = {name: 1 / s.abs().clamp_min(1e-30) for (name, _), s in zip(net.named_parameters(), slopes, strict=True)}
    kernel = empirical_ntk(net, sample.inputs, masks=masks, reduce=None, preconditioner=diagonal)
    speed = torch.einsum("ic,icjd,jd->", g, kernel, g)
    # Weights behind units that are off for all samples have no slope and no part; the rest is float32 rounding.
    assert metrics["gradient_l1"] == pytest.approx(float(speed), rel=1e-3)


def test_correlation_and_interval_are_those_of_scipy():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(12, 1))
    y = x + generator.normal(size=(12, 1))
    found = load("rank_correlation").correlate(x, y, np.arange(12))
    assert found.rho == pytest.approx(stats.spearmanr(x.ravel(), y.ravel()).statistic)
    interval = stats.bootstrap(
        (x.ravel(), y.ravel()), lambda a, b: stats.spearmanr(a, b).statistic, paired=True, vectorized=False,
        n_resamples=999, method="percentile", random_state=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    # The spread of a percentile at 2.5 % of 999 and 2000 resamples; 0.03 was the largest difference of 20 seeds.
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=0.06)
    assert math.isnan(found.inside)  # each point is a group of its own


def test_correlation_inside_groups_ignores_what_differs_between_them():
    x = np.array([[0.0], [1.0], [10.0], [11.0]])
    y = np.array([[1.0], [0.0], [11.0], [10.0]])
    found = load("rank_correlation").correlate(x, y, np.array([0.5, 0.5, 0.9, 0.9]))
    assert found.rho > 0.5
    assert found[3:] == pytest.approx((-1, -1, -1))


def test_whole_points_are_drawn():
    """A hundred seeds a point are no hundred observations: two of four points pull either way."""
    x = np.repeat(np.array([[0.0], [1.0], [2.0], [3.0]]), 100, axis=1)
    y = np.repeat(np.array([[1.0], [0.0], [3.0], [2.0]]), 100, axis=1)
    found = load("rank_correlation").correlate(x, y, np.zeros(4))
    assert found.low < 0 < found.high


def test_a_constant_has_no_correlation():
    found = load("rank_correlation").correlate(np.ones((3, 2)), np.arange(6.0).reshape(3, 2), np.zeros(3))
    assert all(math.isnan(value) for value in found)


def test_paper_changes_defaults_only(example):
    whole = example.parse(["--paper"])
    assert (whole.width, whole.steps, min(whole.sparsities), max(whole.sparsities)) == (1024, 200, 0.5, 0.95)
    part = example.parse(["--paper", "--sparsities", "0.9", "0.8", "--seeds", "1"])
    assert (part.sparsities, part.seeds, part.width) == ([0.8, 0.9], 1, whole.width)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--probe", "4"], "5 samples"), (["--seeds", "0"], "1 seed"), (["--steps", "50"], "60 steps")],
)
def test_settings_that_cannot_work_are_refused(example, capsys, argv, message):
    with pytest.raises(SystemExit):
        example.parse(argv)
    assert message in capsys.readouterr().err


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the trainer's log folder
    text, names = (EXAMPLES.parent / "docs" / "tutorials" / "predicted-loss.md").read_text(encoding="utf-8"), {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "predicted-loss.md", "exec"), names)  # noqa: S102  (our own text)
    curves = names["monitor"].curves
    assert curves["observed"][-1] < curves["observed"][0]
    assert curves["predicted"][-1] < curves["predicted"][0]
