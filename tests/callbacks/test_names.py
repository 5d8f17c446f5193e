"""Names of layers are text, wherever they are shown: tables, pages, pictures, files."""

import io

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit, SpectrumOptions
from lightning_graphon.callbacks._logging.images import npz
from lightning_graphon.graphon import layer_graphons
from lightning_graphon.plots import plot_graphons, plot_loss_decays, plot_masks
from lightning_graphon.report import write_report
from tests.helpers.modules import Classifier, loader, make_trainer

NAMES = ("[/INST]", "[cls]", ":smile:", "<b>&", "a/b", r"$\frac$", "x" * 300, "line\nbreak")


class Named(Classifier):
    """A chain whose first layers have such names."""

    def __init__(self):
        super().__init__()
        first, *rest = self.net
        layers = nn.ModuleDict({"first": first})
        width = first.weight.shape[0]
        layers.update({name: nn.Linear(width, width) for name in NAMES})
        layers.update({f"rest {i}": layer for i, layer in enumerate(rest)})
        self.net = nn.Sequential()
        for name, layer in layers.items():
            self.net.add_module(name, layer)


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_a_fit_and_its_report(logger, tmp_path, capsys):
    model = Named()
    masks = {n: torch.rand_like(p) > 0.5 for n, p in model.named_parameters() if any(name in n for name in NAMES)}
    masks = {n: mask for n, mask in masks.items() if mask.ndim == 2}
    pruner = PruneAtInit.from_masks(masks)
    monitors = (
        GraphonMonitor(bins=4, spectrum=SpectrumOptions(probe_size=8), raise_errors=True),
        LossDecayMonitor(probe_size=8, every_n_steps=1, raise_errors=True),
    )
    trainer = make_trainer(pruner, *monitors, logger=logger(tmp_path, name="run"), default_root_dir=tmp_path)
    trainer.fit(model, loader())
    shown = "".join(capsys.readouterr().out.split())
    assert all("".join(name.split()) in shown for name in NAMES[:-2])  # those two are folded
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "net.&lt;b&gt;&amp;.weight" in page
    if logger is CSVLogger:
        (path,) = tmp_path.rglob("graphons/*.npz")
        assert sorted(np.load(path)) == sorted(masks)
        assert not list(tmp_path.rglob("*.tmp"))


def test_arrays_of_any_name():
    arrays = {name: np.ones(2) for name in ("file", "allow_pickle", "a/b")}
    with np.load(io.BytesIO(npz(arrays))) as found:
        assert sorted(found) == sorted(arrays)
        assert found["file"].tolist() == [1, 1]


def test_figures():
    masks = {name: torch.rand(6, 6) > 0.5 for name in NAMES}
    for figure in (
        plot_masks({r"$\frac$": masks}),
        plot_graphons(layer_graphons(masks, bins=3)),
        plot_loss_decays({name: {"observed": {0: 1.0, 1: 0.5}} for name in NAMES}),
    ):
        figure.canvas.draw()
