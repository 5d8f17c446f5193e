"""Starts a script in two real processes and reads what each of them found."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def two_processes():
    """`two_processes(script, folder)` -> what the two ranks wrote to `rank0.pt` and `rank1.pt` in the folder."""

    def run(script, folder):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("PL_GLOBAL_SEED", None)  # of an earlier test
        roots = [str(HERE.parent.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
        start = time.monotonic()
        command = [sys.executable, str(HERE / script), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        while not (folder / "rank1.pt").exists() and time.monotonic() < start + 400:
            time.sleep(0.1)
        return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]

    return run
