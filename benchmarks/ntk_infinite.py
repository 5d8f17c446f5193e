"""Infinite-width kernel, N = 1024, 4 hidden layers, float64: ours against neural-tangents in an environment of its own.

python benchmarks/ntk_infinite.py            # makes a temporary environment with jax and neural-tangents
python benchmarks/ntk_infinite.py --alone    # ours only
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lightning_graphon.graphon import StepGraphon
from lightning_graphon.ntk import graphon_ntk

PEER = """
import time, jax, numpy as np
jax.config.update("jax_enable_x64", True)
from neural_tangents import stax
layers = sum([[stax.Dense(1, W_std=2**0.5, b_std=0.0), stax.Relu()] for _ in range(4)], [])
kernel = jax.jit(lambda x: stax.serial(*layers, stax.Dense(1, W_std=2**0.5, b_std=0.0))[2](x, None, "ntk"))
x = np.random.default_rng(0).normal(size=(1024, 784))
kernel(x).block_until_ready()
for _ in range(7):
    start = time.perf_counter(); kernel(x).block_until_ready(); print(time.perf_counter() - start)
"""
VERSIONS = ["neural-tangents==0.6.5", "jax==0.4.35", "jaxlib==0.4.35", "numpy<2"]


def graphons(positions: int) -> list[StepGraphon]:
    g = torch.Generator().manual_seed(0)
    shapes = [(positions, 784), *[(positions, positions)] * 3, (1, positions)]
    if positions == 1:
        return [StepGraphon(torch.ones(1, 1, dtype=torch.float64))] * 5
    return [StepGraphon(torch.rand(*s, generator=g, dtype=torch.float64)) for s in shapes]


def seconds(positions: int, repeats: int) -> float:
    x = torch.randn(1024, 784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chain, best = graphons(positions), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        graphon_ntk(x, chain)
        best = min(best, time.perf_counter() - start)
    return best


def peer_seconds(folder: str) -> float:
    python = Path(folder) / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *VERSIONS], check=True)
    out = subprocess.run([python, "-c", PEER], check=True, capture_output=True, text=True).stdout
    return min(float(line) for line in out.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", action="store_true", help="without neural-tangents")
    args = parser.parse_args()
    one, many = seconds(1, 10), seconds(64, 2)
    print("| | minimum (s) |\n|---|---|")
    print(f"| constant graphon | {one:.4f} |\n| 64 positions a layer | {many:.3f} |")
    if not args.alone:
        with tempfile.TemporaryDirectory() as folder:
            peer = peer_seconds(folder)
        print(f"| neural-tangents 0.6.5 | {peer:.4f} |")
        print(f"\nratio to neural-tangents: constant {one / peer:.2f}, 64 positions {many / peer:.1f}")


if __name__ == "__main__":
    main()
