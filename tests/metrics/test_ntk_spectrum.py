import pickle

import pytest
import torch

from lightning_graphon.metrics.ntk_spectrum import NTKSpectrum
from lightning_graphon.ntk import spectral_summary


def kernels():
    for seed in range(3):
        a = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        yield a @ a.T


def test_mean_over_updates():
    metric = NTKSpectrum(prefix="ntk/")
    for k in kernels():
        metric.update(k)
    values = metric.compute()
    truth = [spectral_summary(k) for k in kernels()]
    assert values["ntk/decay_rate"].item() == pytest.approx(sum(s.decay_rate for s in truth) / 3)
    assert values["ntk/energy_top5"].item() == pytest.approx(sum(s.energy_concentration for s in truth) / 3)
    assert metric.last.trace == truth[-1].trace
    metric.reset()
    metric.update(next(kernels()))
    assert metric.compute()["ntk/trace"].item() == pytest.approx(truth[0].trace)


def test_pickles_and_clones():
    metric = NTKSpectrum()
    metric.update(next(kernels()))
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        torch.testing.assert_close(other.compute(), metric.compute())


def test_states_add_up_over_processes():
    parts = [NTKSpectrum() for _ in range(3)]
    whole = NTKSpectrum()
    for part, k in zip(parts, kernels(), strict=True):
        part.update(k)
        whole.update(k)
    merged = NTKSpectrum()
    merged.sums, merged.counts = sum(p.sums for p in parts), sum(p.counts for p in parts)
    merged._update_count = 3
    torch.testing.assert_close(merged.compute(), whole.compute())
    assert all(f is torch.sum or f.__name__ == "dim_zero_sum" for f in whole._reductions.values())


def test_one_number_alone():
    metric, every = NTKSpectrum(prefix="ntk/", key="energy_top5"), NTKSpectrum()
    for k in kernels():
        metric.update(k)
        every.update(k)
    assert metric.compute() == every.compute()["energy_top5"]
    with pytest.raises(ValueError, match="unknown key 'energy'. Did you mean 'energy_top5'"):
        NTKSpectrum(key="energy")
