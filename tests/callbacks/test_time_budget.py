"""What monitors may cost: known before, kept while running, whatever the network is."""

import logging
import math
from time import perf_counter, sleep
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_graphon._shared.affordable import largest_affordable
from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, SpectrumOptions
from lightning_graphon.callbacks._analysis import time_budget
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget


class Trainer(SimpleNamespace):
    __hash__ = object.__hash__


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time_budget, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(TimeBudget, "floor", 3.0)
    return Clock(monkeypatch)


def begun(planned, share=0.05, step=0):
    trainer = Trainer(global_step=step, estimated_stepping_batches=planned, optimizers=[None])
    TimeBudget.join(trainer, share)
    budget = TimeBudget.of(trainer)
    budget.start(trainer)
    return trainer, budget


def test_a_share_of_the_planned_time_and_three_seconds_at_least(clock):
    trainer, budget = begun(planned=10_000)
    assert (budget.step_seconds, budget.allowed) == (None, 3.0)
    with budget.spending(trainer):
        clock.now += 2.0
    trainer.global_step, clock.now = 100, clock.now + 10.0
    with budget.spending(trainer):
        pass
    assert budget.step_seconds == pytest.approx(0.1), "without the monitors' own two seconds"
    assert budget.allowed == pytest.approx(0.05 * 10_000 * 0.1)
    assert budget.left == pytest.approx(48.0)
    assert budget.portion(0.25) == pytest.approx(12.5)


def test_a_resumed_fit_is_planned_from_where_it_goes_on(clock):
    trainer, budget = begun(planned=1000, step=900)
    clock.now, trainer.global_step = clock.now + 100.0, 910
    with budget.spending(trainer):
        pass
    assert budget.allowed == pytest.approx(0.05 * 100 * 10.0)


def test_monitors_share_one_budget_and_every_fit_has_its_own(clock):
    trainer, budget = begun(planned=10)
    with budget.spending(trainer):
        clock.now += 2.5
    assert TimeBudget.of(trainer) is budget
    TimeBudget.join(trainer, 0.05)
    TimeBudget.join(trainer, 0.2)
    assert TimeBudget.of(trainer) is not budget
    assert (TimeBudget.of(trainer).share, TimeBudget.of(trainer).left) == (0.2, 3.0)


def test_looks_are_as_seldom_as_the_rest_of_the_training_can_afford(clock):
    trainer, budget = begun(planned=1000)
    assert budget.spacing(0.0) == 0
    assert budget.spacing(0.03) == pytest.approx(1000 * 0.03 / 1.5)
    with budget.spending(trainer):
        clock.now += 3.0
    assert budget.spacing(0.001) == math.inf


def test_training_without_an_end(clock):
    trainer, budget = begun(planned=math.inf)
    trainer.global_step, clock.now = 100, clock.now + 100.0
    with budget.spending(trainer):
        clock.now += 4.0
    assert budget.allowed == pytest.approx(5.0)
    assert budget.spacing(0.5) == pytest.approx(0.5 / 0.05)


def test_no_limit(clock):
    _, budget = begun(planned=10, share=math.inf)
    assert budget.portion(0.1) == math.inf
    assert budget.spacing(10.0) == 0


@pytest.mark.parametrize("value", [0, -1, math.nan])
@pytest.mark.parametrize("kind", [GraphonMonitor, LossDecayMonitor])
def test_budgets_that_are_none(kind, value):
    with pytest.raises(ValueError, match="time_budget must be positive, a share of the training time such as 0.05"):
        kind(time_budget=value)


def test_what_is_afforded_grows_until_time_ends():
    tried = []

    def run(size):
        tried.append(size)
        sleep(0.002 * size)
        return size

    result, size = largest_affordable(run, [1, 2, 4, 8, 16, 4000], float, 0.5)
    assert result == size == 16
    assert tried[0] == 1
    assert 4000 not in tried, "eight seconds"


def test_what_memory_is_too_short_for_is_not_afforded():
    def run(size):
        if size > 2:
            raise MemoryError("full")
        return size

    assert largest_affordable(run, [1, 2, 3], lambda s: 1.0, 100.0)[1] in (1, 2)
    with pytest.raises(ZeroDivisionError):
        largest_affordable(lambda s: 1 // 0, [1, 2], float, 1.0)


class Words(nn.Module):
    """As many outputs a sample as a language model has, and parameters of every kind."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(300, 64), nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
        self.out = nn.Linear(64, 300)

    def forward(self, x):
        return self.out(self.layer(self.embed(x)))


class LanguageModel(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Words()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x).flatten(0, 1), y.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def words(count=256, length=16):
    return torch.randint(300, (count, length), generator=torch.Generator().manual_seed(0))


def test_a_language_model_is_trained_in_time_with_a_spectrum_and_a_prediction(tmp_path, monkeypatch, caplog):
    """Its exact kernel has 4800 outputs per sample: it took longer than anybody waits."""
    monkeypatch.setattr(TimeBudget, "floor", 15.0)  # three seconds of a machine that others use
    data = DataLoader(TensorDataset(words(), words().roll(1, 1)), 16)
    graphons = GraphonMonitor(verbose=False, figure=False)
    losses = LossDecayMonitor(verbose=False, every_n_steps=5)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[graphons, losses], default_root_dir=tmp_path,
    )  # fmt: skip
    start = perf_counter()
    trainer.fit(LanguageModel(), data)
    # Not a matter of speed: without a budget it would take minutes. The limit leaves room for a busy machine.
    assert perf_counter() - start < 60
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert graphons.spectrum.eigenvalues.min() > -1e-8
    assert losses.curves["predicted"].isfinite().any()


def test_a_spectrum_of_part_is_that_of_the_whole_within_its_error():
    """Sixteen of forty outputs: the trace is a mean over outputs, each about as large as another."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 40)).double()
    from lightning_graphon.dynamics import ProbedNetwork
    from lightning_graphon.ntk import empirical_ntk

    network = ProbedNetwork(net, torch.randn(10, 6, dtype=torch.float64), lambda outputs: outputs.sum())
    whole = network.empirical(empirical_ntk)
    numbers = torch.randperm(40)[:16]
    part = network.selected(numbers).empirical(empirical_ntk)
    each = network.empirical(empirical_ntk, reduce="per_output")
    torch.testing.assert_close(part, each[numbers].mean(0))
    error = each.diagonal(dim1=1, dim2=2).sum(1).std() / 4
    assert abs(part.trace() - whole.trace()) < 3 * error


def test_options_are_used_where_time_has_no_limit(tmp_path):
    graphons = GraphonMonitor(
        raise_errors=True, verbose=False, figure=False, spectrum=SpectrumOptions(ntk="empirical", probe_size=20)
    )
    module = LanguageModel()
    module.net = nn.Sequential(nn.Embedding(300, 4), nn.Linear(4, 3))
    module.training_step = lambda batch, batch_idx: F.cross_entropy(module.net(batch[0])[:, 0], batch[1][:, 0] % 3)
    data = DataLoader(TensorDataset(words(), words()), 64)
    pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[graphons], default_root_dir=tmp_path,
    ).fit(module, data)  # fmt: skip
    assert graphons.spectrum.eigenvalues.shape == (20,)


class Slow(nn.Module):
    """So many layers that each look at all of them takes longer than its part of a small budget."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(40)), nn.Linear(32, 300), nn.Linear(300, 5))

    def forward(self, x):
        return self.net(x)


class Plain(pl.LightningModule):
    def __init__(self, net, groups=False):
        super().__init__()
        self.net, self.groups = net, groups

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        if not self.groups:
            return torch.optim.SGD(self.parameters(), lr=0.01)
        return torch.optim.SGD([{"params": [p], "lr": 0.01 + 1e-4 * i} for i, p in enumerate(self.parameters())])


def fit(model, *callbacks, **options):
    data = DataLoader(TensorDataset(torch.randn(64, 32), torch.randint(5, (64,))), 16)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[*callbacks], **options,
    )  # fmt: skip
    trainer.fit(model, data)
    return trainer


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("lightning_graphon")]


def test_layers_that_there_is_no_time_for_are_named_and_tried_again(monkeypatch, caplog, tmp_path):
    from lightning_graphon.callbacks import graphon_monitor as module

    numbers = module.layer_numbers
    monkeypatch.setattr(TimeBudget, "floor", 0.4)
    monkeypatch.setattr(module, "layer_numbers", lambda *a: sleep(0.02) or numbers(*a))
    watch = GraphonMonitor(raise_errors=True, verbose=False, figure=False, spectrum=None)
    fit(Plain(Slow()), watch, max_epochs=1, default_root_dir=tmp_path)
    names = [name for name, _ in Slow().named_parameters() if "weight" in name]
    done = [name for name in names if f"net.{name}" in watch.graphons]
    assert 0 < len(done) < len(names)
    assert list(watch.tests) == list(watch.graphons)
    assert "net.net.40.weight" not in watch.graphons, "the largest comes last"
    (said,) = warnings_of(caplog)
    assert "has no time for" in said
    assert said.endswith("net.net.40.weight. time_budget=math.inf leaves out none.")
    everything = GraphonMonitor(verbose=False, figure=False, spectrum=None, time_budget=math.inf)
    fit(Plain(Slow()), everything, max_epochs=1, default_root_dir=tmp_path)
    assert list(everything.graphons) == [f"net.{name}" for name in names]


def test_looks_at_masks_are_as_seldom_as_time_allows(monkeypatch, tmp_path):
    from lightning_graphon.callbacks import graphon_monitor as module

    looks, read = [], module.masks_in_use
    monkeypatch.setattr(TimeBudget, "floor", 0.5)
    monkeypatch.setattr(module, "masks_in_use", lambda *a: looks.append(sleep(0.02)) or read(*a))
    watch = GraphonMonitor(raise_errors=True, verbose=False, figure=False, spectrum=None, every_n_steps=1)
    trainer = fit(Plain(nn.Linear(32, 5)), watch, max_epochs=50, default_root_dir=tmp_path)
    assert trainer.global_step == 200
    assert 2 <= len(looks) <= 30
    assert TimeBudget.of(trainer).spent < 2 * 0.5


def test_a_learning_rate_for_each_parameter(monkeypatch, caplog, tmp_path):
    """So many kernels: even the smallest of each would take longer than there is time."""
    from lightning_graphon.dynamics import forecast_kernels as module

    computed, of = [], module.AffordableKernels._of
    monkeypatch.setattr(TimeBudget, "floor", 15.0)
    monkeypatch.setattr(module.AffordableKernels, "_of", lambda *a: computed.append(sleep(0.2)) or of(*a))
    watch = LossDecayMonitor(predict="kernel", raise_errors=True, verbose=False, figure=False)
    fit(Plain(Slow(), groups=True), watch, max_epochs=2, default_root_dir=tmp_path)
    assert len(computed) == 1
    assert any("kernels for each of 84 learning rates take" in said for said in warnings_of(caplog))
    assert watch.curves["observed"].isfinite().any()


def test_a_prediction_that_is_far_behind_is_given_up(monkeypatch, caplog, tmp_path):
    """Thousands of steps between two looks take longer to follow than all looks together may."""
    from lightning_graphon.dynamics import LossDecayPredictor

    step = LossDecayPredictor.step
    monkeypatch.setattr(TimeBudget, "floor", 3.0)
    monkeypatch.setattr(LossDecayPredictor, "step", lambda *a, **k: sleep(0.05) or step(*a, **k))
    watch = LossDecayMonitor(predict="kernel", raise_errors=True, verbose=False, figure=False, every_n_steps=100)
    trainer = fit(Plain(nn.Linear(32, 5)), watch, max_epochs=50, default_root_dir=tmp_path)
    assert any("following the prediction takes more than time_budget allows" in said for said in warnings_of(caplog))
    assert TimeBudget.of(trainer).spent < 5, "ten seconds, all followed"


def test_time_is_put_aside_for_the_spectrum_of_the_end(clock):
    trainer, budget = begun(planned=10)
    budget.reserved = 1.0
    with budget.spending(trainer):
        clock.now += 2.0
    assert budget.left == 0
    budget.reserved = 0.0
    assert budget.left == pytest.approx(1.0)


def test_a_budget_that_is_spent_reads_no_network(monkeypatch, caplog, tmp_path):
    from lightning_graphon.callbacks._analysis import affordable_network as module

    read = []
    monkeypatch.setattr(TimeBudget, "floor", 1e-9)
    monkeypatch.setattr(module, "TrainingStepNetwork", lambda *a: read.append(a))
    watch = [m(verbose=False, figure=False) for m in (GraphonMonitor, LossDecayMonitor)]
    fit(Plain(nn.Linear(32, 5)), *watch, max_steps=3, default_root_dir=tmp_path)
    assert read == []
    assert any("time_budget leaves" in said for said in warnings_of(caplog))
