"""Finite-width kernel of a masked MLP, 784-1024x4-10, 90 % sparse, float32: row-Gram and the torch.func tutorial.

The tutorial's method is `vmap(jacrev)` and an einsum per parameter. It takes minutes and many gigabytes at N
= 128, so it runs at `--tutorial-samples` in a process of its own; its arithmetic grows at least linearly in
N, and the printed ratio at N = 128 scales it linearly (a lower bound). `--full` runs it at 128. Peak memory
is the growth of the resident set, each measurement in a process of its own.

    python benchmarks/ntk_empirical.py
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from _timing import machine
from torch import nn

from lightning_graphon.ntk import empirical_ntk


def masked_mlp() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    sizes = [784, 1024, 1024, 1024, 1024, 10]
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]  # noqa: RUF007
    model = nn.Sequential(*layers[:-1])
    masks = {n: torch.rand(p.shape) < 0.1 for n, p in model.named_parameters() if p.ndim == 2}
    return model, masks


def ours(samples: int) -> object:
    model, masks = masked_mlp()
    return lambda: empirical_ntk(model, torch.randn(samples, 784), masks=masks)


def tutorial(samples: int) -> object:
    """https://pytorch.org/tutorials/intermediate/neural_tangent_kernels.html, method 1, masks multiplied in."""
    model, masks = masked_mlp()
    params = {n: p.detach() for n, p in model.named_parameters()}
    x = torch.randn(samples, 784)

    def one(values: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        masked = {n: v * masks[n] if n in masks else v for n, v in values.items()}
        return torch.func.functional_call(model, masked, (sample[None],))[0]

    def run() -> torch.Tensor:
        jacobian = torch.func.vmap(torch.func.jacrev(one), (None, 0))(params, x)
        parts = [torch.einsum("Naf,Maf->NM", j.flatten(2), j.flatten(2)) for j in jacobian.values()]
        return torch.stack(parts).sum(0) / 10

    return run


def measure(name: str, samples: int, repeats: int) -> None:
    """In a process of its own: minimum seconds and growth of the peak resident set, as JSON."""
    run = {"ours": ours, "tutorial": tutorial}[name](samples)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()  # type: ignore[operator]
        seconds.append(time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    print(json.dumps({"seconds": min(seconds), "gigabytes": grown}))


def apart(name: str, samples: int, repeats: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name, str(samples), str(repeats)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tutorial-samples", type=int, default=16)
    parser.add_argument("--full", action="store_true", help="run the tutorial's method at N = 128")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], int(args.measure[1]), int(args.measure[2]))
        return
    few = 128 if args.full else args.tutorial_samples
    small, large, peer = apart("ours", 128, 5), apart("ours", 1024, 1), apart("tutorial", few, 1)
    scale = 128 / few
    print(f"## Finite-width NTK of a masked MLP, 784-1024x4-10, 90 % sparse, float32\n\n{machine()}\n")
    print("| | seconds | peak growth, GB |\n|---|---|---|")
    print(f"| ours, N = 128 | {small['seconds']:.2f} | {small['gigabytes']:.3f} |")
    print(f"| ours, N = 1024 | {large['seconds']:.2f} | {large['gigabytes']:.3f} |")
    print(f"| torch.func tutorial, N = {few} | {peer['seconds']:.1f} | {peer['gigabytes']:.2f} |")
    ratio = scale * peer["seconds"] / small["seconds"]
    memory = scale * peer["gigabytes"] / max(small["gigabytes"], 1e-3)
    print(f"\nN = 128: {ratio:.0f} times faster in 1/{memory:.0f} of the memory (tutorial scaled by {scale:g})")


if __name__ == "__main__":
    main()
