"""Every kind of model under all three callbacks together: what `docs/reference/compatibility.md` promises."""

import logging
import math

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch.nn import functional as F

from lightning_graphon.callbacks import GraphonMonitor, KernelPrediction, LossDecayMonitor, PruneAtInit, SpectrumOptions
from tests.helpers.kinds import KINDS
from tests.helpers.modules import Autoencoder, loader, make_trainer, pruned_max


class Recorder(Logger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name = version = "recorder"

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs): ...

    def series(self, key):
        """Step -> value of one key."""
        return {step: metrics[key] for step, metrics in self.rows if key in metrics}


def all_three(method="snip", **pruner):
    """The callbacks, with errors of an analysis as errors."""
    return (
        PruneAtInit(method, 0.5, verbose=False, batches=2, **pruner),
        GraphonMonitor(bins=8, figure=False, verbose=False, raise_errors=False, spectrum=SpectrumOptions(probe_size=4)),
        LossDecayMonitor(
            predict="kernel",
            probe_size=4,
            every_n_steps=1,
            figure=False,
            verbose=False,
            raise_errors=True,
            kernel=KernelPrediction(change_every_n_steps=1, start_step=1),
        ),
    )


def fit(kind, *callbacks, **kwargs):
    model, logger = kind.build(), Recorder()
    trainer = make_trainer(*callbacks, logger=logger, log_every_n_steps=1, **kwargs)
    trainer.fit(model, kind.data())
    return model, trainer, logger


@pytest.mark.parametrize("name", KINDS, ids=[k.replace(" ", "-").replace(",", "") for k in KINDS])
def test_trains_under_all_three(name, tmp_path, caplog):
    kind = KINDS[name]
    prune, graphons, losses = all_three(**kind.pruner)
    with caplog.at_level(logging.WARNING, logger="lightning_graphon"):
        model, trainer, logger = fit(kind, prune, graphons, losses, default_root_dir=tmp_path)

    assert prune.masks.sparsity == pytest.approx(0.5, abs=1 / prune.masks.total)
    assert pruned_max(model, prune.masks) == 0.0
    check_graphons(prune, graphons, logger, kind.spectrum)
    check_losses(logger, trainer, kind.refusal)
    check_words(caplog, kind)
    check_checkpoint(trainer, kind, tmp_path)


def test_kernel_of_several_modules_is_that_of_one(tmp_path):
    """The encoder and the decoder that a training_step calls one after the other are one network."""

    class Joined(Autoencoder):
        def forward(self, x):
            return self.decoder(self.encoder(x))

        def training_step(self, batch):
            return F.mse_loss(self(batch[0]), batch[0])

    watches = []
    for build in (Autoencoder, Joined):
        watch = GraphonMonitor(
            figure=False, verbose=False, raise_errors=True, spectrum=SpectrumOptions(ntk="empirical", probe_size=6)
        )
        make_trainer(watch, default_root_dir=tmp_path).fit(build(), loader(48))
        watches.append(watch)
    torch.testing.assert_close(watches[0].spectrum.eigenvalues, watches[1].spectrum.eigenvalues)


def check_graphons(prune, graphons, logger, spectrum):
    assert list(graphons.graphons) == list(prune.masks)
    for layer, mask in prune.masks.items():
        assert logger.series(f"graphon/{layer}/density")[0] == pytest.approx(float(mask.float().mean()), abs=1e-6)
    values = [v for _, m in logger.rows for k, v in m.items() if k.startswith(("graphon/", "ntk/", "sparsity/"))]
    assert all(math.isfinite(v) for v in values)
    assert bool(logger.series("ntk/trace")) == spectrum


def check_losses(logger, trainer, refusal):
    observed, error = logger.series("loss_decay/observed"), logger.series("loss_decay/relative_error")
    steps = list(range(0, trainer.global_step + 1, 2 if refusal == "2 optimizers" else 1))
    assert list(observed) == steps
    assert all(math.isfinite(v) and v > 0 for v in observed.values())
    assert len(set(observed.values())) > 1, "the loss of the probe has not moved at all"
    if refusal is None:
        # The first after the start, at step 1; a prediction far above every loss is not logged, and then void.
        assert math.isfinite(error[2]) if 2 in error else logger.series("loss_decay/invalid_from")
        assert error[1] < 1e-4  # at the start it is the observed loss, in single precision
    else:
        assert not error
        assert not logger.series("loss_decay/predicted")


def check_words(caplog, kind):
    """One sentence where something cannot be done, none where it can."""
    said = [r.getMessage() for r in caplog.records if r.name.startswith("lightning_graphon")]
    refusals = [s for s in said if "predicts nothing" in s]
    assert len(refusals) == (kind.refusal is not None)
    assert all(kind.refusal in s for s in refusals)
    spectra = [s for s in said if "shows no spectrum" in s]
    assert len(spectra) == (not kind.spectrum), spectra
    assert not [s for s in said if "failed" in s]


def check_checkpoint(trainer, kind, tmp_path):
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    dense = kind.build()
    dense.configure_model()
    assert list(state["state_dict"]) == list(dense.state_dict())
    dense.load_state_dict(state["state_dict"], strict=True)
