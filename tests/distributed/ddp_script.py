"""Runs under two processes (strategy="ddp"); every rank writes what it found to the folder given.

Not a test by itself: `test_ddp.py` starts it and looks at what it wrote.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, SpectrumOptions
from tests.helpers.leaving import write_and_leave
from tests.helpers.modules import Classifier, Probe, cnn, loader, make_trainer, quiet


class OwnSeed(Callback):
    """Gives every rank other random numbers, before anything is pruned."""

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(1000 + trainer.global_rank)
        np.random.seed(1000 + trainer.global_rank)


class OtherWeight(Callback):
    """One rank's network differs, as after a bug in somebody's code."""

    def on_fit_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.net[0].weight.mul_(-3).add_(1)


class Unequal(Callback):
    """Rank 0 is slow and draws more random numbers."""

    def on_fit_start(self, trainer, pl_module):
        if trainer.global_rank == 0:
            torch.rand(17)


def fit(method, *before, model=None, sparsity=0.9, precision="64-true", **kwargs):
    pruner = quiet(method, sparsity, batches=2)
    probe, model = Probe(pruner), model or Classifier(seed=1)
    watch = GraphonMonitor(
        verbose=False, figure=False, raise_errors=True, spectrum=SpectrumOptions(probe_size=16, every_n_epochs=1)
    )
    losses = LossDecayMonitor(probe_size=8, every_n_steps=1, figure=False, verbose=False, raise_errors=True)
    trainer = make_trainer(
        *before, watch, pruner, losses, probe, strategy="ddp", devices=2, precision=precision, max_epochs=2, **kwargs
    )
    trainer.fit(model, loader(batch_size=16), loader(32))
    sample = trainer.train_dataloader.sampler
    sample.set_epoch(0)  # the order in which the first epoch, and the scoring, saw the data
    return {
        "masks": dict(pruner.masks),
        "graphons": {name: graphon.values for name, graphon in watch.graphons.items()},
        "trace": watch.spectrum.trace if watch.spectrum else None,
        "losses": losses.curves,
        "worst": probe.worst,
        "seen": probe.seen["step"],
        "random": torch.rand(1).item(),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "indices": list(iter(sample))[:32],
        "keys": list(model.state_dict()),
    }


def main(folder):
    found = {}
    for method in ("random", "magnitude", "snip", "grasp", "synflow"):
        found[method] = fit(method, OwnSeed(), Unequal())
    found["batch norm"] = fit("snip", OwnSeed(), model=Classifier(cnn))
    # Scores and kernels in float64 of networks that train in float32.
    found["synflow, float32"] = fit("synflow", OwnSeed(), precision="32-true")
    found["batch norm, float32"] = fit("random", OwnSeed(), model=Classifier(cnn), precision="32-true")
    try:
        fit("magnitude", OtherWeight())
        found["other weight"] = "nothing was said"
    except RuntimeError as error:
        found["other weight"] = str(error)
    write_and_leave(found, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
