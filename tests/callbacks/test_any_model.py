"""Networks that users bring, at the callbacks' defaults: what `docs/how-to/any-model.md` says."""

import ast
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit
from lightning_graphon.callbacks._analysis import kernel_spectrum
from lightning_graphon.dynamics import forecast_kernels
from lightning_graphon.pruning import select_weights
from tests.helpers.architectures import ARCHITECTURES, BATCHES, Architecture, DenseGraphs, dense_graphs
from tests.helpers.modules import make_trainer, pruned_max

Size = TypeVar("Size")
Result = TypeVar("Result")
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "any-model.md"


class Row(NamedTuple):
    """A line of the page's table."""

    model: str
    dense: str
    share: str
    spectrum: str
    predicted: str
    remedy: str


ROWS = [
    Row(*(cell.strip() for cell in line.strip("|\n").split("|")))
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and line.count("|") == 7 and not line.startswith("| model")
]


@pytest.fixture(params=ROWS, ids=lambda row: row.model)
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Row:
    line: Row = request.param
    if "part" in line.spectrum:  # no test can afford all outputs, and on a busy machine no time can be relied on
        for module in (kernel_spectrum, forecast_kernels):
            monkeypatch.setattr(module, "largest_affordable", few)
    return line


def few(run: Callable[[Size], Result], sizes: Sequence[Size], *_: Any) -> tuple[Result, Size]:
    """The fourth size, as where no time is left for more."""
    return run(sizes[:4][-1]), sizes[:4][-1]


def fit(architecture: Architecture, *callbacks: pl.Callback, folder: Path) -> tuple[pl.LightningModule, pl.Trainer]:
    torch.manual_seed(0)
    model = architecture.build()
    trainer = make_trainer(*callbacks, default_root_dir=folder, limit_train_batches=1.0)
    torch.manual_seed(0)
    trainer.fit(model, architecture.data())
    return model, trainer


def test_the_page_has_a_row_for_each() -> None:
    assert [row.model for row in ROWS] == list(ARCHITECTURES)


def test_all_three_do_what_the_page_says(
    row: Row, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    prune = PruneAtInit("snip", sparsity=0.9, verbose=False)
    graphons, losses = GraphonMonitor(), LossDecayMonitor(verbose=False, horizon=2)
    with caplog.at_level(logging.WARNING, "lightning_graphon"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model, trainer = fit(ARCHITECTURES[row.model], prune, graphons, losses, folder=tmp_path)

    assert trainer.state.finished
    assert trainer.global_step == BATCHES * len(trainer.optimizers)
    check_masks(row, model, prune, [str(t.message) for t in told])
    assert list(graphons.graphons) == list(prune.masks)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("lightning_graphon")]
    assert not [text for text in said if "failed" in text]
    check_spectrum(row, graphons, said, capsys.readouterr().out)
    check_prediction(row, losses, said)


def check_masks(row: Row, model: nn.Module, prune: PruneAtInit, told: list[str]) -> None:
    assert prune.masks is not None
    assert prune.masks.sparsity == pytest.approx(0.9, abs=0.001)
    assert pruned_max(model, prune.masks) == 0.0
    left = [name for name, p in model.named_parameters() if p.ndim > 1 and name not in prune.masks]
    assert bool(left) == (row.dense != "")
    for word in re.findall(r"`(\w+)`", row.dense):
        assert any(word in name for name in left), word
    network = usual(row.model) or model
    total = sum(p.numel() for p in network.parameters())
    selected = sum(p.numel() for p in quietly(network).values())
    assert f"{100 * selected / total:.1f} %" == row.share
    warned = [text for text in told if text.startswith("not pruned")]
    assert len(warned) == ("warned" in row.dense)
    if pattern := re.search(r"`(include|exclude)=(.*)`", row.remedy):
        other = quietly(model, **{pattern[1]: ast.literal_eval(pattern[2])})
        assert set(other) == (
            set(prune.masks) | set(left) if pattern[1] == "include" else set(other) & set(prune.masks)
        )
        assert len(other) != len(prune.masks)


def check_spectrum(row: Row, graphons: GraphonMonitor, said: list[str], printed: str) -> None:
    refusals = [text for text in said if "shows no spectrum at step 0" in text]
    assert len(refusals) == (graphons.spectrum is None)
    if graphons.spectrum is None:
        assert not [text for text in said if "shows no spectrum at step 12" in text], "said once"
        assert sentence(row.spectrum) in refusals[0]
    else:
        limit = "step 0: Graphon NTK" in printed
        assert limit or "step 0: empirical NTK" in printed
        assert row.spectrum == ("limit" if limit else "exact, part" if "outputs" in printed else "exact")
        assert torch.isfinite(graphons.spectrum.eigenvalues).all()


def check_prediction(row: Row, losses: LossDecayMonitor, said: list[str]) -> None:
    assert torch.isfinite(losses.curves["observed"]).all()
    steps, refusals = losses.curves["step"], [text for text in said if "predicts nothing from step 0" in text]
    made = steps[losses.curves["predicted"].isfinite()]
    if refusals:
        assert len(refusals) == 1
        assert sentence(row.predicted) in refusals[0]
        assert not len(made)
    else:
        by_rehearsal = torch.equal(losses.curves["predicted"], losses.curves["rehearsed"])
        assert row.predicted == f"from step {int(made[0])}" + ", rehearsed" * by_rehearsal


def sentence(cell: str) -> str:
    """What is quoted in a cell."""
    quoted = re.search(r'"(.*)"', cell)
    assert quoted is not None, cell
    return quoted[1]


@cache
def usual(name: str) -> nn.Module | None:
    """The network of the size that people use, without memory for its weights."""
    build = ARCHITECTURES[name].usual
    with torch.device("meta"):
        return None if build is None else build()


def quietly(network: nn.Module, **patterns: Any) -> dict[str, nn.Parameter]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return select_weights(network, **patterns)


def test_weights_are_as_without(row: Row, tmp_path: Path) -> None:
    """Bit by bit: under monitors alone, and under a pruner that removes nothing."""
    architecture = ARCHITECTURES[row.model]
    dense = fit(architecture, folder=tmp_path)[0].state_dict()
    monitors = GraphonMonitor(verbose=False), LossDecayMonitor(verbose=False, horizon=2)
    for callbacks in (monitors, (PruneAtInit("snip", sparsity=0.0, verbose=False),)):
        watched = fit(architecture, *callbacks, folder=tmp_path)[0].state_dict()
        assert not [name for name, value in dense.items() if not torch.equal(value, watched[name])]


def test_dense_batches_of_graphs_have_spectrum_and_prediction(tmp_path: Path) -> None:
    """The remedy of the page."""
    graphons, losses = (kind(verbose=False, raise_errors=True) for kind in (GraphonMonitor, LossDecayMonitor))
    fit(Architecture(DenseGraphs, dense_graphs), graphons, losses, folder=tmp_path)
    assert graphons.spectrum is not None
    assert torch.isfinite(losses.curves["predicted"]).any()
