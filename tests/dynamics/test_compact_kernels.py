"""Kernels in checkpoints: small, and the same bits when they come back."""

import io

import pytest
import torch

from lightning_graphon.callbacks import LossDecayMonitor
from lightning_graphon.dynamics.compact_kernels import mirrored, pack_kernels, unpack_kernels
from tests.helpers.modules import Classifier, loader, make_trainer

CPU = torch.device("cpu")


def kernels(shape, dtype=torch.float32):
    jacobian = torch.randn(shape[0], torch.Size(shape[1 : len(shape) // 2 + 1]).numel(), 7, dtype=dtype)
    return mirrored((jacobian @ jacobian.mT).reshape(shape).double())


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 5), (3, 4, 2, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back(shape, dtype):
    before = kernels(shape, dtype)
    packed = pack_kernels(before)
    size = before[0].numel() ** 0.5
    assert packed["entries"].shape == (shape[0], size * (size + 1) / 2)
    assert packed["entries"].dtype == dtype
    after = unpack_kernels(packed, CPU)
    assert after.dtype == torch.float64
    assert torch.equal(before, after)


def test_what_is_mirrored():
    assert mirrored(torch.tensor([[[1.0, 7.0], [2.0, 3.0]]])).tolist() == [[[1, 2], [2, 3]]]


def test_what_does_not_fit():
    packed = pack_kernels(kernels((1, 3, 3)))
    assert unpack_kernels(torch.ones(1, 2, 2), CPU).sum() == 4, "of an older checkpoint"
    with pytest.raises(ValueError, match=r"kernels of shape \[1, 4, 4\] cannot have entries \[1, 6\]"):
        unpack_kernels({**packed, "shape": [1, 4, 4]}, CPU)


def test_the_state_of_a_small_network_is_small():
    """A hundred kB for a probe of 128 samples of 10 classes that pushes itself."""
    watch, buffer = LossDecayMonitor(predict="kernel", verbose=False, figure=False, raise_errors=True), io.BytesIO()
    trainer = make_trainer(watch, max_epochs=-1, max_steps=40, limit_train_batches=1.0)
    trainer.fit(Classifier(), loader(n=200))
    torch.save(watch.state_dict(), buffer)
    assert len(watch._session.tracker.initial.outputs) == 128
    assert buffer.tell() < 100_000
