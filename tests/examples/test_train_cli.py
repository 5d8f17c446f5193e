"""The LightningCLI example: it trains as it is, and gains masks by a preset."""

import runpy
from pathlib import Path

import pytest
import torch

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit
from lightning_graphon.presets import preset_path

pytest.importorskip("sklearn")
pytest.importorskip("jsonargparse")

SCRIPT = Path(__file__).parents[2] / "examples" / "train_cli.py"
QUICK = ["max_epochs=1", "limit_val_batches=1", "enable_progress_bar=false", "enable_model_summary=false"]


def run(tmp_path, monkeypatch, *arguments):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(SCRIPT))["main"]
    return main(["fit", *arguments, "--model.width=32", *(f"--trainer.{option}" for option in QUICK)])


def test_knows_nothing_of_this_library(tmp_path, monkeypatch):
    code = [line for line in SCRIPT.read_text().split('"""', 2)[2].splitlines() if line.strip()]
    assert not any("graphon" in line for line in code)
    assert len(code) <= 60
    cli = run(tmp_path, monkeypatch)
    assert all(torch.count_nonzero(p) == p.numel() for p in cli.model.parameters())


def test_gains_everything_by_a_preset(tmp_path, monkeypatch):
    cli = run(tmp_path, monkeypatch, "--config", str(preset_path("full")))
    kinds = {type(callback): callback for callback in cli.trainer.callbacks}
    masks = kinds[PruneAtInit].masks
    assert masks.sparsity == pytest.approx(0.9, abs=1e-3)
    for name, mask in masks.items():
        assert not cli.model.get_parameter(name)[~mask].any()
    assert len(kinds[GraphonMonitor].graphons) == 3
    rehearsed = kinds[LossDecayMonitor].curves["rehearsed"]
    assert len(rehearsed) == 15  # all steps at first, then fewer, of 23
    assert rehearsed.isfinite().all()
