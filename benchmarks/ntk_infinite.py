"""Infinite-width kernel, N = 1024, 4 hidden layers, float64: ours against neural-tangents in an environment of its own.

python benchmarks/ntk_infinite.py            # makes a temporary environment with jax and neural-tangents
python benchmarks/ntk_infinite.py --alone    # ours only
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from _peer import peer
from _timing import machine, report

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
for _ in iter(input, "stop"):
    start = time.perf_counter(); kernel(x).block_until_ready(); print(time.perf_counter() - start, flush=True)
"""
VERSIONS = ["neural-tangents==0.6.5", "jax==0.4.35", "jaxlib==0.4.35", "numpy<2"]


def graphons(positions: int) -> list[StepGraphon]:
    g = torch.Generator().manual_seed(0)
    shapes = [(positions, 784), *[(positions, positions)] * 3, (1, positions)]
    if positions == 1:
        return [StepGraphon(torch.ones(1, 1, dtype=torch.float64))] * 5
    return [StepGraphon(torch.rand(*s, generator=g, dtype=torch.float64)) for s in shapes]


def ours(positions: int) -> Callable[[], float]:
    x = torch.randn(1024, 784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chain = graphons(positions)

    def run() -> float:
        start = time.perf_counter()
        graphon_ntk(x, chain)
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", action="store_true", help="without neural-tangents")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    candidates = {"constant graphon": ours(1), "64 positions a layer": ours(64)}
    with nullcontext() if args.alone else peer(VERSIONS, PEER) as ask:
        if ask:
            candidates = {"neural-tangents 0.6.5": lambda: float(ask("go")), **candidates}
        for run in candidates.values():
            run()
        seconds = {name: [] for name in candidates}
        for _ in range(args.repeats):
            for name, run in candidates.items():
                seconds[name].append(run())
    print(f"## Infinite-width NTK, 1024 samples, 4 hidden layers, float64\n\n{machine()}")
    report("ReLU, no bias", seconds, next(iter(candidates)))


if __name__ == "__main__":
    main()
