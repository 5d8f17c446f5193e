"""Rows shared out over processes: the same numbers as on one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_graphon.ntk import TileShard, empirical_ntk, graphon_ntk, world_tile_shard

SCRIPT = """
import sys, torch, torch.distributed as dist
from torch import nn
from lightning_graphon.graphon import StepGraphon
from lightning_graphon.ntk import empirical_ntk, graphon_ntk, world_tile_shard
rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)).double()
x = torch.randn(11, 6, dtype=torch.float64)
masks = {"0.weight": torch.rand(8, 6) < 0.5}
one = StepGraphon(torch.rand(3, 6).double()), StepGraphon(torch.rand(2, 3).double())
for reduce in ("mean", "per_output", None):
    alone, shared = (empirical_ntk(model, x, masks=masks, reduce=reduce, group=g) for g in (None, "world"))
    torch.testing.assert_close(shared, alone)
torch.testing.assert_close(
    empirical_ntk(model, x[:4], x2=x[4:], group="world"), empirical_ntk(model, x[:4], x2=x[4:])
)
torch.testing.assert_close(graphon_ntk(x, one, reduce=None, group="world"), graphon_ntk(x, one, reduce=None))
assert world_tile_shard().size == size
print("all equal", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3])
def test_equals_one_process(size, tmp_path):
    root = Path(__file__).parents[3]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(size), str(tmp_path)], cwd=root,
            env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    for run in runs:
        # Not the exit code: gloo's own threads now and then abort a process that has finished.
        printed, errors = run.communicate()
        assert "all equal" in printed, errors


def test_parts_by_hand_add_up(monkeypatch):
    """Every part holds tiles of its own; their sum is the kernel."""
    monkeypatch.setattr(TileShard, "collect", lambda self, partial: partial)
    x = torch.randn(11, 4, dtype=torch.float64)
    model = torch.nn.Linear(4, 2).double()
    parts = [empirical_ntk(model, x, group=TileShard(r, 3)) for r in range(3)]
    torch.testing.assert_close(sum(parts), empirical_ntk(model, x))
    assert all(bool(p.any()) and not bool(p.all()) for p in parts)


def test_needs_a_process_group():
    assert world_tile_shard() == TileShard()
    with pytest.raises(RuntimeError, match="init_process_group"):
        graphon_ntk(torch.ones(2, 3), [], group="world") if False else TileShard.from_group("world")
