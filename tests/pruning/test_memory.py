"""Memory beside the model: gradients of one model where scores need them, masks of a byte a weight, little else."""

from collections.abc import Callable

import pytest

SCRIPT = """
import sys, torch
from torch import nn
from lightning_graphon.pruning import prune
torch.set_num_threads(1)
method, options = sys.argv[1], eval(sys.argv[2])
batches = [(torch.rand(4, 2000), torch.arange(4))] * 2
prune(nn.Linear(2000, 20), method, sparsity=0.9, batches=batches, **options)
net = nn.Sequential(*[nn.Linear(2000, 2000) for _ in range(8)])
size = 4 * sum(p.numel() for p in net.parameters())
before = peak()
prune(net, method, sparsity=0.9, batches=batches, **options)
print((peak() - before) / size)
"""


@pytest.mark.parametrize(
    ("method", "options", "models"),
    [
        # Measured, and up to a fifth of the model's size to spare. Masks, the scores of a layer: 0.51.
        ("magnitude", "{}", 0.7),
        # Scores, masks, what the selection needs for a moment: 1.34 and 1.36.
        ("random", "{}", 1.54),
        ("snip", "{}", 1.54),
        # Masks of two rounds: 1.59. Scores of twice the size: 2.78 (2.63 when |θ| became its scores in place).
        ("synflow", "{'steps': 3, 'options': {'double': False}}", 1.79),
        ("synflow", "{'steps': 3}", 2.98),
    ],
)
def test_peak_beside_the_model(measured: Callable[..., list[float]], method: str, options: str, models: float) -> None:
    (needed,) = measured(SCRIPT, method, options)
    assert models - 0.3 < needed < models  # far less would mean that nothing was measured
