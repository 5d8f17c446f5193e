"""Kernels in files: the same numbers, each tile once, whatever happens in between."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_graphon.ntk import empirical_ntk, graphon_ntk_from_model, kernel_to_file

ROOT = Path(__file__).parents[3]
X = torch.randn(23, 5, generator=torch.Generator().manual_seed(0)).double()


class Linear:
    """A kernel that counts its calls and stops at one of them."""

    def __init__(self, stop=None, scale=1.0):
        self.calls, self.stop, self.scale = [], stop, scale

    def __call__(self, a, b):
        self.calls.append((len(a), None if b is None else len(b)))
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        return self.scale * a @ (a if b is None else b).T


@pytest.mark.parametrize("tile", [2, 5, 8, 23, 100])
@pytest.mark.parametrize("other", [None, X[:9] + 1])
def test_is_the_kernel(tmp_path, tile, other):
    path = tmp_path / "kernel.npy"
    rule, seen = Linear(), []
    found = kernel_to_file(rule, X, path, x2=other, tile=tile, progress=lambda *now: seen.append(now))
    torch.testing.assert_close(found, X @ (X if other is None else other).T)
    torch.testing.assert_close(torch.from_numpy(np.load(path)), found)
    rows, cols = -(-23 // tile), -(-(23 if other is None else 9) // tile)
    count = rows * (rows + 1) // 2 if other is None else rows * cols  # symmetric tiles only once
    assert len(rule.calls) == count + 1  # the probe
    assert seen == [(i + 1, count) for i in range(count)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kernel.npy", "kernel.npy.json"]


def test_goes_on_where_it_was_interrupted(tmp_path):
    path = tmp_path / "kernel.npy"
    with pytest.raises(KeyboardInterrupt):
        kernel_to_file(Linear(stop=8), X, path, tile=5)
    assert not path.exists()
    rest = Linear()
    found = kernel_to_file(rest, X, path, tile=5)
    torch.testing.assert_close(found, X @ X.T)
    assert len(rest.calls) == 1 + 15 - 6
    again = Linear()
    torch.testing.assert_close(kernel_to_file(again, X, path, tile=5), X @ X.T)
    assert len(again.calls) == 1  # only to see that it is the same kernel
    found[0] = 0  # in memory
    assert np.load(path)[0].any()


KILLED = """
import sys, time, torch
from lightning_graphon.ntk import kernel_to_file
def rule(a, b):
    time.sleep(0.05)
    return a @ (a if b is None else b).T
x = torch.randn(23, 5, generator=torch.Generator().manual_seed(0)).double()
kernel_to_file(rule, x, sys.argv[1], tile=3, progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.slow
def test_survives_being_killed(tmp_path):
    path = tmp_path / "kernel.npy"
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while int(run.stdout.readline()) < 7:
        pass
    run.send_signal(signal.SIGKILL)
    run.wait()
    rest = Linear()
    torch.testing.assert_close(kernel_to_file(rest, X, path, tile=3), X @ X.T)
    assert len(rest.calls) <= 1 + 36 - 7


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X + 1e-6}, "other samples"),
        ({"x": X[:22]}, "other shape"),
        ({"x2": X}, "other samples"),
        ({"tile": 6}, "other tile"),
        ({"kernel_fn": Linear(scale=1.001)}, "another kernel of the same samples"),
        ({"kernel_fn": lambda a, b: (a @ (a if b is None else b).T).float()}, "other dtype"),
    ],
)
def test_refuses_the_file_of_another_kernel(tmp_path, complete, change, message):
    path = tmp_path / "kernel.npy"
    if complete:
        kernel_to_file(Linear(), X, path, tile=5)
    else:
        with pytest.raises(KeyboardInterrupt):
            kernel_to_file(Linear(stop=4), X, path, tile=5)
    with pytest.raises(ValueError, match=message):
        kernel_to_file(**{"kernel_fn": Linear(), "x": X, "path": path, "tile": 5, **change})
    torch.testing.assert_close(kernel_to_file(Linear(), X, path, tile=5), X @ X.T)


def test_refuses_what_is_not_its_own(tmp_path):
    path = tmp_path / "kernel.npy"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        kernel_to_file(Linear(), X, path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("rule", "message"),
    [(lambda a, b: a, "kernel_fn must give"), (lambda a, b: a @ (a if b is None else b).T / 0, "not finite")],
)
def test_refuses_what_is_no_kernel(tmp_path, rule, message):
    with pytest.raises(ValueError, match=message):
        kernel_to_file(rule, X, tmp_path / "kernel.npy")


def test_processes_give_the_same_numbers(tmp_path):
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    masks = {"0.weight": torch.rand(16, 5) < 0.5}
    for name, rule in (
        ("graphon", lambda a, b: graphon_ntk_from_model(model, a, masks, x2=b)),
        ("exact", lambda a, b: empirical_ntk(model, a, masks=masks, x2=b)),
    ):
        found = kernel_to_file(rule, X, tmp_path / name, tile=7, workers=2)
        torch.testing.assert_close(found, rule(X, None))


def test_an_error_in_a_process_is_told(tmp_path):
    def rule(a, b):
        if b is not None and os.getpid() != parent:
            raise ValueError("on purpose")
        return a @ (a if b is None else b).T

    parent = os.getpid()
    with pytest.raises(ValueError, match="on purpose"):
        kernel_to_file(rule, X, tmp_path / "kernel", tile=7, workers=2)
    assert json.loads((tmp_path / "kernel.json").read_text())["tile"] == 7
    torch.testing.assert_close(kernel_to_file(Linear(), X, tmp_path / "kernel", tile=7), X @ X.T)


MEMORY = """
import resource, sys, torch
from lightning_graphon.ntk import kernel_to_file
x = torch.randn(6000, 4).double()
rule = lambda a, b: a @ (a if b is None else b).T
rule(x[:256], x[:256])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kernel_to_file(rule, x, sys.argv[1], tile=256)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_tile(tmp_path):
    """The file has 288 MB."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "kernel.npy")], cwd=ROOT, capture_output=True, text=True
    )
    assert float(run.stdout) < 60, run.stderr
