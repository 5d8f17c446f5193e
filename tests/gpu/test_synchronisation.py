"""Between two looks the callbacks never make the host wait for the device."""

from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit, SpectrumOptions
from tests.helpers.modules import Classifier, loader, make_trainer

pytestmark = pytest.mark.only_cuda
WAITS = ("Memcpy DtoH", "cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense")
FIRST, LAST = 12, 24


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


class Profiled(Callback):
    """Counts what waits in some steps that begin after the first looks and end before the next."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == FIRST:
            self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profile.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == LAST:
            self._profile.__exit__(None, None, None)
            names = [event.name for event in self._profile.events()]
            self.waits = Counter(next((w for w in WAITS if name.startswith(w)), "") for name in names)
            self.waits.pop("", None)


def waits(optimizer, *callbacks, **kwargs):
    profiled = Profiled()
    # 96 samples in batches of 2: one epoch of 48 steps, no other look than those at its ends and at step 50.
    make_trainer(*callbacks, profiled, accelerator="gpu", limit_train_batches=1.0, **kwargs).fit(
        Classifier(optimizer=optimizer), loader(96, batch_size=2)
    )
    return profiled.waits


@pytest.mark.parametrize("optimizer", [adam, fused])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}, {"precision": "16-mixed"}], ids=str
)
def test_no_step_waits_that_did_not_without_the_callbacks(optimizer, options, tmp_path):
    if optimizer is fused and "gradient_clip_val" in options and "16-mixed" in str(options):
        pytest.skip("Lightning refuses fused optimizers with clipping under a scaler")
    options["default_root_dir"] = tmp_path
    dense = waits(optimizer, **options)
    callbacks = (
        PruneAtInit("random", 0.9, verbose=False),
        GraphonMonitor(verbose=False, figure=False, spectrum=SpectrumOptions(probe_size=8)),
        LossDecayMonitor(verbose=False, figure=False, probe_size=8),
    )
    assert waits(optimizer, *callbacks, **options) == dense
