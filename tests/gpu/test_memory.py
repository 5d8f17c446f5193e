"""Peaks of device memory against what each analysis was allowed; running out of it."""

import gc

import pytest
import torch
from torch import nn

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit, SpectrumOptions
from lightning_graphon.graphon import StepGraphon
from lightning_graphon.ntk import empirical_ntk, graphon_ntk
from lightning_graphon.pruning import prune
from tests.helpers.networks import mlp

pytestmark = pytest.mark.only_cuda
MIB = 1 << 20
# Workspaces of cuBLAS and cuDNN, and the allocator's blocks of 2 MiB and more.
WORKSPACE = 64 * MIB


def peak(work, device):
    """Bytes allocated at the same time beyond those before, of the second of two calls: the first loads libraries."""
    work()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@pytest.mark.parametrize("allowed", [64 * MIB, 256 * MIB, 1024 * MIB])
def test_exact_kernel_within_its_memory(allowed, device):
    model = mlp(1024, 4, inputs=256, outputs=10).to(device)
    masks = prune(model, "random", sparsity=0.9)
    x = torch.randn(512, 256, device=device)
    used = peak(lambda: empirical_ntk(model, x, masks=masks, max_memory=allowed), device)
    # Beside the budget: masked weights and the masks as numbers, twice the model.
    model_size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"exact kernel: {used / MIB:.0f} MiB used of {allowed / MIB:.0f} MiB and {2 * model_size / MIB:.0f} MiB")
    assert used <= allowed + 2 * model_size + WORKSPACE


@pytest.mark.parametrize("allowed", [16 * MIB, 64 * MIB, 256 * MIB])
@pytest.mark.parametrize("positions", [1, 32])
def test_infinite_kernel_within_its_memory(positions, allowed, device):
    shapes = [(positions, 64), (positions, positions), (positions, positions), (1, positions)]
    graphons = [StepGraphon(torch.rand(shape, device=device, dtype=torch.float64)) for shape in shapes]
    x = torch.randn(1024, 64, device=device, dtype=torch.float64)
    used = peak(lambda: graphon_ntk(x, graphons, max_memory=allowed), device)
    result = 2 * 8 * len(x) ** 2
    print(f"infinite kernel, {positions} positions: {used / MIB:.0f} MiB of {(allowed + result) / MIB:.0f} MiB")
    assert used <= allowed + result + WORKSPACE


# Times the model's own size, beside the model: as on a CPU (tests/pruning/test_memory.py), with workspaces.
@pytest.mark.parametrize(
    ("method", "options", "models"),
    [
        ("magnitude", {}, 0.9),
        ("random", {}, 1.6),
        ("snip", {}, 1.7),
        ("synflow", {"steps": 3, "options": {"double": False}}, 1.9),
        ("synflow", {"steps": 3}, 3.0),
    ],
)
def test_pruning_beside_the_model(method, options, models, device):
    net = nn.Sequential(*[nn.Linear(2000, 2000) for _ in range(8)]).to(device)
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    batches = [(torch.rand(4, 2000, device=device), torch.arange(4, device=device))]
    used = peak(lambda: prune(net, method, sparsity=0.9, batches=batches, **options), device)
    print(f"{method}: {used / size:.2f} times the model")
    assert used <= models * size + WORKSPACE


@pytest.fixture
def little(device):
    """`little(bytes)` lets torch have so many beyond those in use now."""
    total = torch.cuda.get_device_properties(device).total_memory

    def limit(beyond):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + beyond) / total, device)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    torch.cuda.empty_cache()


def test_exact_kernel_goes_on_with_less_where_memory_runs_out(little, device):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(25088, 10))
    model, x = model.to(device), torch.randn(64, 3, 32, 32, device=device)
    expected = empirical_ntk(model, x, max_memory=64 * MIB)
    little(400 * MIB)
    with pytest.warns(UserWarning, match="ran out of memory"):
        found = empirical_ntk(model, x, max_memory=16 << 30)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_monitor_without_memory_does_not_end_training(little, device, tmp_path):
    """The weights and their training fit; the kernel, which needs them several times in float64, does not."""
    from tests.helpers.modules import Classifier, loader, make_trainer

    wide = lambda: nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.Linear(4096, 10))  # noqa: E731
    module, prune_ = Classifier(wide), PruneAtInit("random", 0.9, verbose=False)
    graphons = GraphonMonitor(verbose=False, spectrum=SpectrumOptions(ntk="empirical", probe_size=64))
    losses = LossDecayMonitor(verbose=False, every_n_steps=1)
    trainer = make_trainer(prune_, graphons, losses, accelerator="gpu", default_root_dir=tmp_path)
    # Weights of 68 MiB, as much again for gradients, momentum and an update, a byte a weight for masks and for erasing.
    little(450 * MIB)
    trainer.fit(module, loader())
    assert graphons.spectrum is None
    assert trainer.global_step == 3
    assert all(parameter.isfinite().all() for parameter in module.parameters())
