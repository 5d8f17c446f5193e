"""Memory beside the model: gradients of one model where scores need them, masks of a byte a weight, little else."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from torch import nn
from lightning_graphon.pruning import prune
torch.set_num_threads(1)
method, options = sys.argv[1], eval(sys.argv[2])
batches = [(torch.rand(4, 2000), torch.arange(4))] * 2
prune(nn.Linear(2000, 20), method, sparsity=0.9, batches=batches, **options)
net = nn.Sequential(*[nn.Linear(2000, 2000) for _ in range(8)])
size = 4 * sum(p.numel() for p in net.parameters())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prune(net, method, sparsity=0.9, batches=batches, **options)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize(
    ("method", "options", "models"),
    [
        # Measured, and a tenth of the model's size to spare. Masks, the scores of a layer: 0.60.
        ("magnitude", "{}", 0.7),
        # Scores, masks, what the selection needs for a moment: 1.44.
        ("random", "{}", 1.54),
        ("snip", "{}", 1.54),
        # Masks of two rounds: 1.69. Scores of twice the size: 2.79.
        ("synflow", "{'steps': 3, 'options': {'double': False}}", 1.79),
        ("synflow", "{'steps': 3}", 2.89),
    ],
)
def test_peak_beside_the_model(method: str, options: str, models: float) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, method, options]
    # Large blocks go back to the system when freed: what is measured is what is held, not holes in glibc's heap.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert float(result.stdout) < models
