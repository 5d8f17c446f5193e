"""Infinite-width kernels of convolutional networks, images of 16 x 16, float64: ours against neural-tangents.

python benchmarks/ntk_convolutions.py                      # makes a temporary environment with jax and neural-tangents
python benchmarks/ntk_convolutions.py --networks flat      # one of flat, residual, gap
"""

import argparse
import time
from collections.abc import Callable

import torch
from _peer import peer
from _timing import machine, report
from ntk_infinite import VERSIONS
from torch import nn

from lightning_graphon.ntk import graphon_ntk_from_model

PEER = """
import time, jax, numpy as np
jax.config.update("jax_enable_x64", True)
from neural_tangents import stax
def conv(): return stax.Conv(1, (3, 3), padding="SAME", W_std=2**0.5, b_std=None)
def branch(): return stax.serial(stax.Relu(), conv())
dense, flat = stax.Dense(1, W_std=2**0.5, b_std=None), stax.Flatten()
residual = stax.serial(stax.FanOut(2), stax.parallel(branch(), stax.Identity()), stax.FanInSum())
networks = {
    "flat": [conv(), stax.Relu(), conv(), stax.Relu(), flat, dense],
    "residual": [conv(), residual, residual, stax.Relu(), flat, dense],
    "gap": [conv(), stax.Relu(), conv(), stax.Relu(), stax.GlobalAvgPool(), dense],
}
kernels = {}
for line in iter(input, "stop"):
    name, n = line.split()
    x = np.random.default_rng(0).normal(size=(int(n), 16, 16, 1))
    if line not in kernels:
        kernels[line] = jax.jit(lambda x, f=stax.serial(*networks[name])[2]: f(x, None, "ntk"))
        kernels[line](x).block_until_ready()
    start = time.perf_counter(); kernels[line](x).block_until_ready(); print(time.perf_counter() - start, flush=True)
"""
WIDTH = 64


class Residual(nn.Module):
    """x + conv(relu(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x.relu())


def conv(inputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, WIDTH, 3, padding=1, bias=False)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    flat = [nn.Flatten(), nn.Linear(256 * WIDTH, 1, bias=False)]
    layers = {
        "flat": [conv(1), nn.ReLU(), conv(WIDTH), nn.ReLU(), *flat],
        "residual": [conv(1), Residual(), Residual(), nn.ReLU(), *flat],
        "gap": [conv(1), nn.ReLU(), conv(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.Linear(WIDTH, 1, bias=False)],
    }  # fmt: skip
    return nn.Sequential(*layers[name]).double()


def ours(name: str, samples: int, bins: int) -> Callable[[], float]:
    model = network(name)
    x = torch.randn(samples, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = {n: torch.rand_like(p) < 0.5 for n, p in model.named_parameters()} if bins > 1 else None

    def run() -> float:
        start = time.perf_counter()
        graphon_ntk_from_model(
            model, x, masks, bins=bins, propagate="density", parameterization="ntk", weight_variance=2.0
        )
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["flat", "residual", "gap"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"## Infinite-width NTK of convolutional networks, {args.samples} images, float64\n\n{machine()}")
    with peer(VERSIONS, PEER) as ask:
        for name in args.networks:
            candidates = {
                "neural-tangents 0.6.5": lambda name=name: float(ask(f"{name} {args.samples}")),
                "constant graphon": ours(name, args.samples, 1),
                "8 positions a layer": ours(name, args.samples, 8),
            }
            for run in candidates.values():
                run()
            seconds = {label: [] for label in candidates}
            for _ in range(args.repeats):
                for label, run in candidates.items():
                    seconds[label].append(run())
            report(name, seconds, next(iter(candidates)))


if __name__ == "__main__":
    main()
