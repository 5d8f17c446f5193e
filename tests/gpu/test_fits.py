"""Whole fits on a GPU under all three callbacks, and under every preset."""

import math

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_graphon import callbacks
from lightning_graphon.callbacks import GraphonMonitor, KernelPrediction, LossDecayMonitor, PruneAtInit, SpectrumOptions
from lightning_graphon.presets import preset_path, presets
from tests.helpers.kinds import KINDS, small_sgd
from tests.helpers.modules import Classifier, loader, make_trainer, mlp, pruned_max

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]


def accelerated(device):
    return {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1}


def all_three(start=0, **pruner):
    return (
        PruneAtInit("snip", 0.5, verbose=False, batches=2, **pruner),
        GraphonMonitor(bins=8, verbose=False, spectrum=SpectrumOptions(probe_size=8)),
        LossDecayMonitor(
            probe_size=8,
            every_n_steps=1,
            verbose=False,
            raise_errors=True,
            kernel=KernelPrediction(change_every_n_steps=1, start_step=start),
        ),
    )


def fit(module, data, device, tmp_path, *extra, **kwargs):
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(*extra, logger=logger, log_every_n_steps=1, **accelerated(device), **kwargs)
    trainer.fit(module, data)
    assert next(module.parameters()).isfinite().all()
    return trainer


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:.*")
def test_every_kind_of_module(name, device, tmp_path):
    kind = KINDS[name]
    prune, graphons, losses = all_three(start=1, **kind.pruner)
    module = kind.build()
    fit(module, kind.data(), device, tmp_path, prune, graphons, losses)
    assert pruned_max(module.cpu(), prune.masks.to("cpu")) == 0.0
    assert prune.masks.sparsity == pytest.approx(0.5, abs=1 / prune.masks.total)
    assert losses.curves["observed"].isfinite().all()
    assert (graphons.spectrum is not None) == kind.spectrum
    assert losses.curves["predicted"].isfinite().any() == (kind.refusal is None)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.filterwarnings("ignore:.*")
def test_every_precision(precision, clip, device, tmp_path):
    prune, graphons, losses = all_three()
    module = Classifier(mlp, small_sgd)
    fit(module, loader(), device, tmp_path, prune, graphons, losses, precision=precision, gradient_clip_val=clip)
    assert pruned_max(module.cpu(), prune.masks.to("cpu")) == 0.0
    assert graphons.spectrum.eigenvalues.dtype == torch.float64
    assert math.isfinite(graphons.spectrum.trace)
    assert losses.curves["predicted"][:2].isfinite().all()


def test_the_predicted_loss_is_that_of_the_cpu(device, tmp_path):
    curves = []
    for place in (torch.device("cpu"), device):
        *_, losses = extra = all_three()
        fit(Classifier(mlp, small_sgd), loader(), place, tmp_path, *extra, precision="64-true", max_epochs=3)
        curves.append(losses.curves)
    for name in ("observed", "predicted"):
        torch.testing.assert_close(curves[1][name], curves[0][name], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("preset", presets())
@pytest.mark.filterwarnings("ignore:.*")
def test_every_preset(preset, device, tmp_path):
    entries = yaml.safe_load(preset_path(preset).read_text())["trainer"]["callbacks+"]
    made = [getattr(callbacks, e["class_path"].rpartition(".")[2])(**e["init_args"]) for e in entries]
    module = Classifier(lambda: nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)), small_sgd)
    trainer = fit(module, loader(), device, tmp_path, *made)
    assert trainer.global_step == 3
    pruners = [callback for callback in made if isinstance(callback, PruneAtInit)]
    assert all(pruned_max(module.cpu(), p.masks.to("cpu")) == 0.0 for p in pruners)


def test_resumes_on_another_device(device, tmp_path):
    """A checkpoint written on the GPU goes on there and on a CPU, with the very same masks."""
    prune, *monitors = all_three()
    trainer = fit(Classifier(mlp, small_sgd), loader(), device, tmp_path, prune, *monitors)
    trainer.save_checkpoint(tmp_path / "gpu.ckpt")
    for place in (device, torch.device("cpu")):
        again, *monitors = all_three()
        module = Classifier(mlp, small_sgd)
        resumed = make_trainer(again, *monitors, **accelerated(place), max_epochs=2, default_root_dir=tmp_path)
        resumed.fit(module, loader(), ckpt_path=tmp_path / "gpu.ckpt")
        assert again.masks == prune.masks
        assert pruned_max(module.cpu(), again.masks.to("cpu")) == 0.0
        assert resumed.global_step == 6
