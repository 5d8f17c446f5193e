"""How far the kernel of one network is from its infinite-width limit, against kept fan-in and effective units.

For each width and method: the fluctuation (relative distance of one network's exact kernel from the mean over seeds)
and the bias (of that mean from the mean of the Graphon NTK, without what the fluctuation adds to it). The fan-in is the
smallest, over the layers that read hidden units, of the mean number of kept inputs; `spread` is the sum over them of
1 / effective units (see `expected_error`). Laws
c · fan-in^a and c · spread^a are fitted on log axes. MLP 64-n-n-n-10 and a CNN of two layers with Flatten, ReLU, He
initialisation, digits, 80 % pruned.

    python benchmarks/finite_width.py --out runs/finite_width
"""

import argparse
import json
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import architectures
import noise_floor
import numpy as np
import torch
from torch import Tensor, nn

from lightning_graphon.ntk import empirical_ntk, expected_error, graphon_ntk_from_model
from lightning_graphon.pruning import LayerCollapseWarning

WIDTHS = {"mlp": (32, 64, 128, 256, 512, 1024), "cnn": (16, 32, 64, 128, 256)}
METHODS = {
    "mlp": ("dense", "random", "magnitude", "synflow", "snip"),
    "cnn": ("dense", "random", "magnitude", "synflow"),
}


def network(kind: str, width: int, seed: int) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), noise_floor.network(width, seed))
    return architectures.network("cnn_flat", width, seed)


def size(kind: str, model: nn.Module, masks: dict[str, Tensor] | None) -> dict[str, float]:
    """Smallest mean number of kept inputs of the layers that read hidden units, and Σ 1 / effective units."""
    kept = {name: torch.ones_like(p) if masks is None else masks[name] for name, p in model.named_parameters()}
    fan_in = min(float(mask.flatten(1).sum(1).double().mean()) for mask in list(kept.values())[1:])
    if kind == "cnn":  # channels are the units, 64 positions each
        name = list(kept)[-1]
        kept[name] = kept[name].unflatten(1, (-1, 64))
    found = expected_error(kept)
    assert found is not None  # noqa: S101
    return {"fan_in": fan_in, "spread": (found.error / 1.85) ** 2}


def row(kind: str, width: int, method: str, seeds: int, samples: int) -> dict[str, Any]:
    x, y = architectures.images()
    exact, limit, sizes = [], [], []
    options = {"propagate": "drift" if method == "snip" else "energy"}
    for seed in range(seeds):
        model = network(kind, width, seed)
        masks = noise_floor.masks_in_use(model, method, seed, x, y)
        sizes.append(size(kind, model, masks))
        exact.append(empirical_ntk(model, x[:samples], masks=masks))
        limit.append(graphon_ntk_from_model(model, x[:samples], masks, **options))
    kernels, limits = torch.stack(exact), torch.stack(limit)
    mean, norm = kernels.mean(0), float(kernels.mean(0).norm())
    variance = float(kernels.var(0).sum()) / norm**2
    away = (float((limits.mean(0) - mean).norm()) / norm) ** 2 - variance / seeds
    error = noise_floor.rms([noise_floor.distance(a, b) for a, b in zip(limit, exact, strict=True)])
    return {"network": kind, "width": width, "masks": method,
            **{key: sum(s[key] for s in sizes) / seeds for key in sizes[0]}, "fluctuation": variance**0.5,
            "bias": max(away, 0.0) ** 0.5, "error": error}  # fmt: skip


def law(rows: list[dict[str, Any]], of: str, key: str) -> str:
    """c and a of c · of^a by least squares on log axes, and the factor by which single rows scatter."""
    some = [(r[of], r[key]) for r in rows if r[key] > 0]
    at, value = np.log(np.array(some)).T
    a, offset = np.polyfit(at, value, 1)
    scatter = np.exp((value - offset - a * at).std())
    return (
        f"{key}: {np.exp(offset):.2f} · {of}^{a:.2f}, rows within a factor of {scatter:.2f}, {len(some)} of {len(rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/finite_width"), help="folder of one file per row")
    args = parser.parse_args()
    warnings.simplefilter("ignore", LayerCollapseWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in WIDTHS:
        for width, method in product(WIDTHS[kind], METHODS[kind]):
            path = args.out / f"{kind}_{width}_{method}_t{args.seeds}_n{args.samples}.json"
            if not path.exists():
                path.write_text(json.dumps(row(kind, width, method, args.seeds, args.samples)))
            rows.append(json.loads(path.read_text()))
            print(rows[-1], flush=True)
    print("\n| network | masks | n: fan-in, fluctuation, bias |\n|---|---|---|")
    for kind, method in ((k, m) for k in WIDTHS for m in METHODS[k]):
        own = [r for r in rows if (r["network"], r["masks"]) == (kind, method)]
        cells = [f"{r['width']}: {r['fan_in']:.0f}, {r['fluctuation']:.2f}, {r['bias']:.2f}" for r in own]
        print(f"| {kind} | {method} | {'; '.join(cells)} |")
    for kind in (*WIDTHS, "both"):
        own = [r for r in rows if kind in (r["network"], "both")]
        laws = (law(own, of, key) for of, key in product(("fan_in", "spread"), ("fluctuation", "bias", "error")))
        print(f"{kind}:", *laws, sep="\n  ")


if __name__ == "__main__":
    main()
