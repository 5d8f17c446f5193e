"""How well the Graphon NTK describes networks that are really trained, in units of their own fluctuation.

64-n-n-n-10 ReLU, He initialisation, no bias, scikit-learn digits / 16, 48 samples, sparsity 80 %, weights
kept as they were when pruned. `seed to seed` is the relative Frobenius distance between the kernels of two
seeds (root mean square over pairs); a perfect theory of the mean would be at 0.71 of it. Every column is
error (error / seed to seed).

    python benchmarks/noise_floor.py --widths 128 256 512 --seeds 8
    python benchmarks/noise_floor.py --positions --seeds 4  # rules for the positions of neurons, width 256
"""

import argparse
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_graphon.ntk import empirical_ntk, graphon_ntk_from_model
from lightning_graphon.pruning import prune

THEORIES: dict[str, dict[str, Any]] = {
    "density": {"propagate": "density", "weight_variance": 2.0},
    "energy": {"propagate": "energy"},
    "drift": {"propagate": "drift"},
    "drift, by degree": {"propagate": "drift", "positions": "degree"},
}
POSITIONS: dict[str, dict[str, Any]] = {
    f"{rule}, {bins} bins": {"propagate": "energy", "positions": rule, "bins": bins}
    for rule in ("degree", "energy", "spectral")
    for bins in (4, 16, 64)
}


def network(width: int, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    sizes = [64, width, width, width, 10]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layer = nn.Linear(fan_in, fan_out, bias=False, dtype=torch.float64)
        draw = torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64)
        layer.weight.data = draw * (2 / fan_in) ** 0.5
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def masks_in_use(model: nn.Module, method: str, seed: int, x: Tensor, y: Tensor) -> dict[str, Tensor] | None:
    if method == "dense":
        return None
    scored = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 + seed))[:256]
    batches = [(x[scored], y[scored])]
    return dict(prune(model, method, sparsity=0.8, batches=batches, loss_fn=nn.functional.cross_entropy, seed=seed))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def rms(values: list[float]) -> float:
    return (sum(v * v for v in values) / len(values)) ** 0.5


def row(width: int, method: str, seeds: int, theories: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Fluctuation and errors (root mean square over seeds) of one line of the table."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.data / 16.0), torch.from_numpy(digits.target)
    probe, truth = x[:48], []
    errors: dict[str, list[float]] = {name: [] for name in theories}
    for seed in range(seeds):
        model = network(width, seed)
        masks = masks_in_use(model, method, seed, x, y)
        truth.append(empirical_ntk(model, probe, masks=masks))
        for name, options in theories.items():
            errors[name].append(distance(graphon_ntk_from_model(model, probe, masks, **options), truth[-1]))
    pairs = [distance(a, b) for i, a in enumerate(truth) for b in truth[:i]]
    return {"seed to seed": rms(pairs), **{name: rms(e) for name, e in errors.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--methods", nargs="+", default=["dense", "random", "magnitude", "synflow", "snip"])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--positions", action="store_true", help="compare rules for the positions of neurons")
    args = parser.parse_args()
    theories = POSITIONS if args.positions else THEORIES
    print("| n | masks | seed to seed | " + " | ".join(theories) + " |")
    print("|---" * (3 + len(theories)) + "|")
    for width in [256] if args.positions else args.widths:
        for method in args.methods:
            line = row(width, method, args.seeds, theories)
            unit = line["seed to seed"]
            cells = [f"{line[name]:.3f} ({line[name] / unit:.2f})" for name in theories]
            print(f"| {width} | {method} | {unit:.3f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
