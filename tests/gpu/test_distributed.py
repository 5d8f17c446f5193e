"""Two processes on one card with gloo; NCCL with one; FSDP2 with NCCL and one process."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def started(folder, backend, world, wrapper, device):
    """Start the script in `world` processes on one card; what each rank wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = HERE.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0")
    command = [
        sys.executable,
        str(HERE / "distributed_script.py"),
        str(folder),
        backend,
        wrapper,
        str(world),
        device.type,
    ]
    processes = [
        subprocess.Popen(
            command, env={**environment, "NODE_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    deadline = time.monotonic() + 180
    try:
        printed = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(text[-3000:] for text in printed)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


WAYS = {
    "ddp, gloo, two processes": ("gloo", 2, "ddp"),
    "ddp, nccl, one process": ("nccl", 1, "ddp"),
    "fsdp2, nccl, one process": ("nccl", 1, "fsdp2"),
}


@pytest.mark.parametrize("way", WAYS)
def test_same_masks_everywhere_and_monitors_in_the_first_process(way, device, tmp_path):
    backend, world, wrapper = WAYS[way]
    if device.type == "cpu" and backend == "nccl":
        backend = "gloo"
    ranks = started(tmp_path, backend, world, wrapper, device)
    for method in ("random", "snip", "synflow"):
        found = [rank[method] for rank in ranks]
        kept, total = (sum(int(f(m)) for m in found[0]["masks"].values()) for f in (torch.sum, torch.numel))
        assert kept == round(total / 10)
        for rank in found:
            assert rank["worst"] == 0.0
            assert all(torch.equal(rank["masks"][name], mask) for name, mask in found[0]["masks"].items())
            assert all(torch.equal(rank["weights"][name], w) for name, w in found[0]["weights"].items())
        assert found[0]["trace"] > 0
        assert found[0]["observed"].isfinite().all()
        assert len(found[0]["observed"]) > 2
