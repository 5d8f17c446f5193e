"""Denoising of cells."""

import pytest
import torch

from lightning_graphon.graphon.estimation.total_variation import total_variation


def noisy():
    truth = torch.tensor([0.2, 0.8], dtype=torch.float64).repeat_interleave(8)[:, None].expand(16, 16)
    return truth, (truth + 0.05 * torch.randn(16, 16, dtype=torch.float64)).clamp(0, 1)


def variation(x):
    return float(x.diff(dim=0).abs().sum() + x.diff(dim=1).abs().sum())


def test_noise_goes_and_the_step_stays():
    truth, values = noisy()
    even = torch.full((16,), 1 / 16, dtype=torch.float64)
    found = total_variation(values, even, even, 0.05)
    assert variation(found) < 0.5 * variation(values)
    assert float((found - truth).norm()) < 0.5 * float((values - truth).norm())


def test_the_mean_is_kept_on_cells_of_any_size():
    _, values = noisy()
    rows, cols = (torch.rand(16, dtype=torch.float64) + 0.2 for _ in range(2))
    rows, cols = rows / rows.sum(), cols / cols.sum()
    for weight in (0.01, 1.0, 100.0):
        found = total_variation(values, rows, cols, weight)
        assert float(rows @ found @ cols) == pytest.approx(float(rows @ values @ cols), rel=1e-9)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_without_weight_nothing_changes():
    _, values = noisy()
    even = torch.full((16,), 1 / 16, dtype=torch.float64)
    torch.testing.assert_close(total_variation(values, even, even, 0.0), values, rtol=1e-14, atol=0)
