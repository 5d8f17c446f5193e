"""Training compiled by Inductor under all three callbacks: no graph break, the same masks and losses as eager."""

import os
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from tests.callbacks.test_model_matrix import all_three, fit
from tests.helpers.kinds import Kind, small_sgd
from tests.helpers.modules import Classifier, Recorder, UserNetwork, cnn, mlp, pruned_max

COMPILER = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler: {COMPILER} is not on the path"),
]


def cnn_without_dropout():
    """Inductor draws other random numbers than eager code, so losses under dropout cannot agree."""
    return nn.Sequential(*(layer for layer in cnn() if not isinstance(layer, nn.Dropout)))


@pytest.fixture(autouse=True)
def compiles_anew(tmp_path, monkeypatch):
    """Nothing compiled is taken from an earlier run or left for a later one; no pool of compiling processes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


WAYS = {
    "module.net.compile()": lambda module, **options: module.net.compile(fullgraph=True, **options) or module,
    "module.compile()": lambda module, **options: module.compile(fullgraph=True, **options) or module,
    "torch.compile(module)": torch.compile,
}


def train(net, compile_, folder):
    """The module and its pruner; losses of training, observed and predicted."""
    (prune, graphons, losses), recorder, module = (
        all_three(),
        Recorder(),
        Classifier(lambda: UserNetwork(net()), small_sgd),
    )
    kind = Kind(lambda: compile_(module))
    *_, logger = fit(kind, prune, graphons, losses, recorder, default_root_dir=folder, max_epochs=2)
    series = [list(logger.series(f"loss_decay/{key}").values()) for key in ("observed", "predicted")]
    return module, prune, [recorder.losses, *series]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", [mlp, cnn_without_dropout])
def test_trains_as_eager(net, way, tmp_path):
    backend = CompileCounterWithBackend("inductor")
    _, eager, expected = train(net, lambda module: module, tmp_path)
    module, prune, losses = train(net, lambda module: WAYS[way](module, backend=backend), tmp_path)
    assert 1 <= backend.frame_count <= 2, "more than one recompilation"
    assert not counters["graph_break"]
    assert prune.masks == eager.masks
    assert pruned_max(module, prune.masks) == 0.0
    assert [len(series) for series in losses] == [6, 7, 6]
    for compiled, plain in zip(losses, expected, strict=True):
        # Sums in another order: a few roundings of single precision (1.2e-7); 2.1e-7 was measured.
        assert compiled == pytest.approx(plain, rel=1e-6)
