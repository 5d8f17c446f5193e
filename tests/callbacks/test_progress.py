"""A bar while an analysis is at work for long: on the first process's terminal, and gone afterwards."""

import io
import threading
import time

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit
from lightning_graphon.callbacks._analysis.kernel_spectrum import KernelSpectrum
from lightning_graphon.callbacks._logging import progress
from tests.helpers.modules import Classifier, loader, make_trainer, snapshot

BAR = {"enable_progress_bar": True}


@pytest.fixture
def terminal(monkeypatch):
    """What is written to a terminal, where the bar comes at once."""
    written = io.StringIO()
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "Console", lambda **kwargs: Console(file=written, force_terminal=True, width=80))
    return written


@pytest.fixture
def slow_spectrum(monkeypatch):
    evaluate = KernelSpectrum.evaluate

    def slowly(self, *args):
        time.sleep(0.3)
        return evaluate(self, *args)

    monkeypatch.setattr(KernelSpectrum, "evaluate", slowly)


def fit(*callbacks, model=None, **kwargs):
    trainer = make_trainer(*callbacks, **{**BAR, **kwargs})
    trainer.fit(model or Classifier(), loader())
    return trainer


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_each_callback_says_what_it_does_while_lightning_shows_its_own_bar(terminal, slow_spectrum, bar):
    fit(
        GraphonMonitor(figure=False), LossDecayMonitor(every_n_steps=1, figure=False),
        PruneAtInit("synflow", 0.9, steps=20), bar(),
    )  # fmt: skip
    for title in ("GraphonMonitor: spectrum", "LossDecayMonitor: loss", "pruning by synflow"):
        assert title in terminal.getvalue()
    last = terminal.getvalue().rpartition("GraphonMonitor: spectrum")[2]
    assert "\x1b[2K" in last  # the line is erased
    assert progress._consoles == []


@pytest.mark.parametrize(
    ("verbose", "kwargs"),
    [(False, {}), (True, {"enable_progress_bar": False})],
    ids=["not verbose", "no progress bar"],
)
def test_none_where_none_is_wanted(terminal, slow_spectrum, verbose, kwargs):
    fit(GraphonMonitor(figure=False, verbose=verbose), PruneAtInit("snip", 0.9, verbose=verbose), **kwargs)
    assert "spectrum" not in terminal.getvalue()
    assert "pruning by" not in terminal.getvalue()


def test_none_where_it_is_short(terminal, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 100.0)
    fit(GraphonMonitor(figure=False))
    assert "GraphonMonitor: " not in terminal.getvalue()
    assert "━" not in terminal.getvalue().partition("Layer graphons")[0]


def test_none_where_nobody_looks(capsys, slow_spectrum, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    fit(GraphonMonitor(figure=False))
    assert "GraphonMonitor: " not in capsys.readouterr().out


class Interrupted(Classifier):
    def training_step(self, batch, batch_idx):
        time.sleep(0.3)
        raise KeyboardInterrupt


def test_an_interrupt_ends_the_fit_and_the_bar_and_restores_the_module(terminal):
    model = Interrupted()
    before = snapshot(model)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(GraphonMonitor(figure=False), model=model)
    assert "GraphonMonitor: spectrum" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # erased, and the cursor where it was
    assert progress._consoles == []
    for thread in threading.enumerate():
        if type(thread).__name__ in ("Timer", "_RefreshThread"):
            thread.join(timeout=10)  # a last refresh may be under way
            assert not thread.is_alive()
    after = snapshot(model)
    assert after["training"] == before["training"]
    assert "log" not in vars(model)  # which is muted while training_step is run
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value)
