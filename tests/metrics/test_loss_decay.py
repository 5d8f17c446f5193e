"""Predicted against observed: a numpy oracle, merging, copies, resuming, awkward losses, bounded memory, the figure."""

import ast
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchmetrics import MetricCollection

from lightning_graphon.metrics import (
    LossDecay,
    NTKSpectrum,
    fitted_decay_rate,
    log_correlation,
    loss_decay_errors,
    loss_decay_summary,
)
from tests.helpers.modules import Classifier, loader, make_trainer


def oracle(p, o, t, tolerance):
    """The same numbers by numpy, from the whole curves."""
    p, o, t = (np.asarray(v, dtype=np.float64) for v in (p, o, t))
    error = np.abs(p - o) / np.abs(o)
    good = (p > 0) & (o > 0) & np.isfinite(p) & np.isfinite(o)
    rate = [-np.polyfit(t[good], np.log(v[good]), 1)[0] for v in (p, o)]
    outside = t[~(error <= tolerance)]
    invalid = outside.min() if len(outside) else np.inf
    return {
        "relative_error": error[np.isfinite(error)].mean(),
        "relative_error_last": error[t == t.max()].mean(),
        "log_correlation": np.corrcoef(np.log(p[good]), np.log(o[good]))[0, 1],
        "rate_predicted": rate[0],
        "rate_observed": rate[1],
        "rate_ratio": rate[0] / rate[1],
        "valid_until": t[t < invalid].max(initial=-np.inf),
        "invalid_from": invalid,
        "points": len(t),
    }


def curves(n=60, seed=0, first=0):
    g = np.random.default_rng(seed)
    t = first + np.arange(n) * 3
    o = 2.3 * np.exp(-0.01 * (t - first)) * (1 + 0.02 * g.standard_normal(n))
    return 2.3 * np.exp(-0.012 * (t - first)), o, t


def fed(points, **options):
    metric = LossDecay(**options)
    for p, o, t in zip(*points, strict=True):
        metric.update(p, o, t)
    return metric


def same(a, b, rtol=1e-9):
    assert a.keys() == b.keys()
    for key, value in a.items():
        np.testing.assert_allclose(float(value), float(b[key]), rtol=rtol, err_msg=key)


@pytest.mark.parametrize("first", [0, 10_000_000])
@pytest.mark.parametrize("tolerance", [0.05, 0.2, 10.0])
def test_oracle(tolerance, first):
    points = curves(first=first)
    truth = oracle(*curves(), tolerance)  # far along the axis nothing may change but the steps
    for key in ("valid_until", "invalid_from"):
        truth[key] += first
    same(fed(points, tolerance=tolerance).compute(), truth)
    same(loss_decay_summary(*(torch.from_numpy(v) for v in points), tolerance=tolerance), truth)
    order = np.random.default_rng(1).permutation(60)
    same(fed([v[order] for v in points], tolerance=tolerance).compute(), truth)


@pytest.mark.parametrize("split", ["halves", "alternating", "all but none"])
def test_merging_parts_is_the_whole(split):
    points = curves()
    rows = {"halves": np.arange(60) < 30, "alternating": np.arange(60) % 2 == 0, "all but none": np.arange(60) < 60}
    parts = [fed([v[k] for v in points], tolerance=0.15) for k in (rows[split], ~rows[split])]
    whole = fed(points, tolerance=0.15)
    truth = whole.compute()
    for a, b in (parts, parts[::-1]):
        a.compute() if a.points else None  # a cached result must not survive
        merged = a.clone()
        merged.merge_state(b)
        same(merged.compute(), truth)
        torch.testing.assert_close(merged.curve, whole.curve, equal_nan=True)
    synced = parts[0].clone()  # what torchmetrics does between processes: stack, then reduce
    for name, reduce in synced._reductions.items():
        setattr(synced, name, reduce(torch.stack([getattr(p, name) for p in parts])))
    synced._computed = None
    same(synced.compute(), truth)


SCRIPT = """
import sys, torch, torch.distributed as dist
from lightning_graphon.metrics import LossDecay
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
metric = LossDecay(tolerance=0.15)
for k in range(rank * 30, rank * 30 + 30 - 10 * rank):
    metric.update(0.99**k, 0.985**k, k)
values = dict(metric.compute())
again = metric.compute()
assert metric.points == 30 - 10 * rank
print({k: v.item() for k, v in values.items()}, flush=True)
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_see_the_whole(tmp_path):
    command = [sys.executable, "-c", SCRIPT]
    runs = [
        subprocess.Popen([*command, str(r), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    found = [ast.literal_eval(run.communicate()[0].strip()) for run in runs]
    k = np.arange(50)
    for values in found:
        same(values, oracle(0.99**k, 0.985**k, k, 0.15))


def test_every_process_with_the_same_points_is_one():
    points = curves()
    a, b = fed(points), fed(points)
    truth = dict(a.compute())
    a.merge_state(b)
    values = dict(a.compute())
    assert values.pop("points") == 2 * truth.pop("points")
    same(values, truth)


def test_pickles_clones_resets_and_resumes():
    points = curves()
    metric, half = fed(points), fed([v[:30] for v in points])
    truth = metric.compute()
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        same(other.compute(), truth)
    resumed = LossDecay()
    resumed.load_state_dict(half.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(resumed.compute(), half.compute())
    for p, o, t in zip(*(v[30:] for v in points), strict=True):
        resumed.update(p, o, t)
    same(resumed.compute(), truth)
    torch.testing.assert_close(resumed.curve, metric.curve, equal_nan=True)
    metric.reset()
    for p, o, t in zip(*(v[:30] for v in points), strict=True):
        metric.update(p, o, t)
    same(metric.compute(), half.compute())


def test_states_travel_with_a_module():
    module = nn.Module()
    module.metric = LossDecay()
    assert not list(module.parameters())
    module.metric.update(1.0, 2.0, 3)
    module.half()
    assert module.metric.points.dtype == torch.float64
    assert set(module.state_dict()) == {
        f"metric.{k}" for k in ("points", "finite", "errors", "invalid", "moments", "latest", "curve")
    }


def test_a_collection_keeps_tolerances_apart():
    """torchmetrics lets metrics share states that are equal after the first update."""
    collection = MetricCollection({
        name: LossDecay(tolerance, max_points=2, prefix=f"{name}/") for name, tolerance in (("a", 0.05), ("b", 0.2))
    })  # fmt: skip
    for rows in np.split(np.arange(60), 30):
        collection.update(*(v[rows] for v in curves()))
    values = collection.compute()
    for name, tolerance in (("a", 0.05), ("b", 0.2)):
        assert values[f"{name}/invalid_from"] == oracle(*curves(), tolerance)["invalid_from"]


def test_every_number_alone():
    every = LossDecay()
    every.update(*curves())
    for key, value in every.compute().items():
        metric = LossDecay(key=key)
        metric.update(*curves())
        torch.testing.assert_close(metric.compute(), value, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="unknown key 'error'"):
        LossDecay(key="error")


def test_logged_as_attributes_in_a_dict_and_a_collection(tmp_path):
    """`ModelCheckpoint(monitor=...)` sees them; a metric with a dictionary is an error there."""

    class Logs(Classifier):
        def __init__(self):
            super().__init__()
            self.error = LossDecay(key="relative_error")
            self.spectra = torch.nn.ModuleDict({"rank": NTKSpectrum(key="effective_rank")})
            self.both = MetricCollection({"gap": NTKSpectrum(key="spectral_gap"), "trace": NTKSpectrum(key="trace")})

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            kernel = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))
            self.error.update(1.1 * loss.detach(), loss.detach(), batch_idx)
            self.spectra["rank"].update(kernel)
            self.both.update(kernel)
            self.log("error", self.error, on_step=False, on_epoch=True)
            self.log("rank", self.spectra["rank"], on_step=False, on_epoch=True)
            self.log_dict(self.both, on_step=False, on_epoch=True)
            return loss

    saved = ModelCheckpoint(tmp_path, monitor="error")
    trainer = make_trainer(saved, enable_checkpointing=True)
    trainer.fit(Logs(), loader())
    assert saved.best_model_score.item() == pytest.approx(0.1, rel=1e-6)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert logged == {"error": pytest.approx(0.1, rel=1e-6), "rank": 2.0, "gap": 2.0, "trace": 8.0}


def test_in_and_out_of_inference_mode():
    points = curves()
    metric = LossDecay()
    for k, (p, o, t) in enumerate(zip(*points, strict=True)):
        with torch.inference_mode(k % 2 == 0):
            if k == 0:
                metric.reset()
            metric.update(p, torch.tensor(o), t)
    same(metric.compute(), oracle(*points, 0.1))


def test_forward_gives_the_batch_and_keeps_the_whole():
    points = curves()
    metric = LossDecay()
    assert metric.full_state_update is False
    for p, o, t in zip(*points, strict=True):
        now = metric(p, o, t)
        assert float(now["relative_error"]) == pytest.approx(abs(p - o) / o)
        assert now["points"] == 1
    same(metric.compute(), oracle(*points, 0.1))


def test_nothing_seen():
    metric = LossDecay(prefix="loss_decay/")
    with pytest.warns(UserWarning, match="before the ``update``"):
        values = metric.compute()
    assert all(k.startswith("loss_decay/") for k in values)
    assert all(math.isnan(v) for v in values.values())
    metric.update([], [], [])
    assert math.isnan(metric.compute()["loss_decay/points"])
    assert metric.plot() is not None


def test_zeros_negatives_and_divergence():
    inf, nan = math.inf, math.nan
    p = [1.0, 0.5, 0.25, 0.0, 1.0, -1.0, inf, nan, 0.1]
    o = [1.0, 0.5, 0.25, 0.0, 0.0, -1.0, 2.0, 1.0, nan]
    error = loss_decay_errors(torch.tensor(p), torch.tensor(o))
    torch.testing.assert_close(error, torch.tensor([0, 0, 0, 0, inf, 0, inf, nan, nan]), equal_nan=True)
    same_inf = torch.tensor([inf, -inf, inf]), torch.tensor([inf, inf, -inf])
    assert loss_decay_errors(*same_inf).tolist() == [0, inf, inf]
    values = fed([p, o, range(9)]).compute()
    assert values["relative_error"] == 0  # over the finite ones
    assert math.isnan(values["relative_error_last"])
    assert (values["valid_until"], values["invalid_from"]) == (3, 4)
    assert float(values["rate_ratio"]) == pytest.approx(1.0)  # of the three points that have logarithms
    assert float(values["rate_observed"]) == pytest.approx(math.log(2))
    first = fed([[nan], [1.0], [7]]).compute()
    assert first["invalid_from"] == 7
    assert math.isnan(first["valid_until"])  # it never held


def test_constant_curves_have_no_correlation():
    values = fed([[1.0] * 5, [0.9**k for k in range(5)], range(5)]).compute()
    assert math.isnan(values["log_correlation"])
    assert values["rate_predicted"] == 0
    assert math.isnan(fed([[1.0], [1.0], [0]]).compute()["rate_observed"])


def test_numbers_keep_their_digits():
    metric = LossDecay(tolerance=0.0)
    metric.update(0.1 + 1e-12, 0.1, 2**24 + 1)
    assert metric.compute()["invalid_from"] == 2**24 + 1
    assert float(metric.compute()["relative_error"]) == pytest.approx(1e-11, rel=1e-3)


def test_functions():
    p, o, t = (torch.from_numpy(v).float() for v in curves())
    truth = oracle(p.numpy(), o.numpy(), t.numpy(), 0.1)
    assert float(fitted_decay_rate(o, t)) == pytest.approx(truth["rate_observed"])
    assert float(log_correlation(p, o)) == pytest.approx(truth["log_correlation"])


def test_memory_is_bounded_and_the_curve_spread_out():
    metric = LossDecay(max_points=32)
    for block in torch.arange(20_000.0).split(50):
        metric.update(2 + block, 2 + block, block)
    size = {k: v.numel() for k, v in metric.metric_state.items()}
    assert size["curve"] == 96
    steps = metric.curve[~metric.curve[:, 0].isnan(), 0]
    assert 8 <= len(steps) <= 32
    assert steps[0] == 0
    assert steps[-1] == 19_999
    assert steps.diff().max() < 20_000 / 4
    assert metric.compute()["points"] == 20_000


def test_figure_without_pyplot():
    metric = fed(curves(), tolerance=0.05)
    figure = metric.plot()
    (axis,) = figure.axes
    labels = axis.get_legend_handles_labels()[1]
    assert labels == ["observed", "predicted", "more than 5% apart"]
    assert axis.get_xlabel() == "optimizer step"
    torch.testing.assert_close(torch.from_numpy(axis.lines[1].get_ydata()), metric.curve[:60, 1])
    figure.canvas.draw()
    assert all(float(label.get_text()) > 0 for label in axis.get_yticklabels()), "plain numbers, no powers"
    assert metric.plot(ax=axis) is figure


def test_refuses():
    with pytest.raises(ValueError, match="tolerance"):
        LossDecay(tolerance=-1)
    with pytest.raises(ValueError, match="max_points"):
        LossDecay(max_points=1)
    metric = LossDecay()
    with pytest.raises(ValueError, match="one predicted loss"):
        metric.update([1.0, 2.0], [1.0], [0])
    with pytest.raises(ValueError, match="finite"):
        metric.update(1.0, 1.0, math.nan)
