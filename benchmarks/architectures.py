"""How well the Graphon NTK describes networks of six architectures, in units of their own fluctuation.

He initialisation, no biases, scikit-learn digits / 16 as 8 x 8 images, sparsity 80 %, weights kept as they were when
pruned. `seed to seed` is the mean over pairs of seeds of the relative Frobenius distance of their exact kernels; every
other column is the root mean square over seeds of the distance of the Graphon NTK to the exact kernel of that network,
in units of it. A perfect theory of the mean would be at 0.71. Rows are written as they come, and a stopped run goes on.

    python benchmarks/architectures.py --out runs/architectures
    python benchmarks/architectures.py --out runs/architectures --architectures ln_mlp --methods snip --width 256
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from noise_floor import distance, masks_in_use, rms
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_graphon.ntk import empirical_ntk, graphon_ntk_from_model
from lightning_graphon.pruning import LayerCollapseWarning

METHODS = ("dense", "random", "magnitude", "synflow", "snip", "grasp")
THEORIES: dict[str, dict[str, Any]] = {
    "density": {"propagate": "density", "weight_variance": 2.0},
    "energy": {"propagate": "energy"},
    "drift": {"propagate": "drift"},
}


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.f = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Attention(nn.Module):
    """Eight heads over the rows of an image, and the mean over them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.qkv = linear(8, width), linear(width, 3 * width)
        self.join, self.hidden, self.out = linear(width, width), linear(width, width), linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.flatten(1, 2))
        q, k, v = self.qkv(h).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        h = h + self.join(attended.transpose(1, 2).flatten(2))
        out: Tensor = self.out(torch.relu(self.hidden(h)).mean(1))
        return out


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


def _residual_cnn(n: int) -> nn.Module:
    block = Residual(nn.ReLU(), conv(n, n), nn.ReLU(), conv(n, n))
    return nn.Sequential(conv(1, n), block, nn.ReLU(), nn.Flatten(), linear(64 * n, 10))


def _residual_mlp(n: int) -> nn.Module:
    blocks = [Residual(nn.ReLU(), linear(n, n)) for _ in range(2)]
    return nn.Sequential(nn.Flatten(), linear(64, n), *blocks, nn.ReLU(), linear(n, 10))


def _norm_mlp(n: int) -> nn.Module:
    norm = lambda: nn.LayerNorm(n, elementwise_affine=False)  # noqa: E731
    return nn.Sequential(nn.Flatten(), linear(64, n), norm(), nn.ReLU(), linear(n, n), norm(), nn.ReLU(), linear(n, 10))


def _cnn(n: int, *end: nn.Module) -> nn.Module:
    return nn.Sequential(conv(1, n), nn.ReLU(), conv(n, n), nn.ReLU(), *end)


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "cnn_flat": lambda n: _cnn(n, nn.Flatten(), linear(64 * n, 10)),
    "cnn_gap": lambda n: _cnn(n, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(n, 10)),
    "res_cnn": _residual_cnn,
    "res_mlp": _residual_mlp,
    "ln_mlp": _norm_mlp,
    "attention": Attention,
}


def network(architecture: str, width: int, seed: int) -> nn.Module:
    """He initialisation: each weight has the variance 2 / inputs."""
    model = ARCHITECTURES[architecture](width).double()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.data = draw * (2 / weight[0].numel()) ** 0.5
    return model


def images() -> tuple[Tensor, Tensor]:
    """Digits [N, 1, 8, 8] in [0, 1], and their labels."""
    digits = load_digits()
    return torch.from_numpy(digits.images / 16.0)[:, None], torch.from_numpy(digits.target)


def theories(architecture: str, method: str) -> dict[str, dict[str, Any]]:
    """The drift, which takes a minute, for methods that leave one; attention has none."""
    drifts = architecture != "attention" and method in ("snip", "grasp")
    return {name: options for name, options in THEORIES.items() if drifts or name != "drift"}


def kernels(architecture: str, method: str, width: int, seed: int, samples: int) -> dict[str, Tensor]:
    """The exact kernel of one network, and every theory's."""
    x, y = images()
    model = network(architecture, width, seed)
    masks = masks_in_use(model, method, seed, x, y)
    found = {"exact": empirical_ntk(model, x[:samples], masks=masks)}
    for name, options in theories(architecture, method).items():
        found[name] = graphon_ntk_from_model(model, x[:samples], masks, **options)
    return found


def line(architecture: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fluctuation and errors of one line of the table."""
    start = time.perf_counter()
    found = [kernels(architecture, method, args.width, seed, args.samples) for seed in range(args.seeds)]
    truth = [kernel["exact"] for kernel in found]
    pairs = [distance(a, b) for i, a in enumerate(truth) for b in truth[:i]]
    mean = torch.stack(truth).mean(0)
    row: dict[str, Any] = {"architecture": architecture, "method": method, "width": args.width, "seeds": args.seeds}
    row["seed to seed"] = sum(pairs) / len(pairs)
    row["trace"] = [float(t.trace()) for t in truth]
    for name in theories(architecture, method):
        row[name] = rms([distance(k[name], k["exact"]) for k in found])
        row[f"{name}, of the mean"] = distance(torch.stack([k[name] for k in found]).mean(0), mean)
    return row | {"seconds": time.perf_counter() - start}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    text = "| network | masks | seed to seed | " + " | ".join(THEORIES) + " |\n" + "|---" * (3 + len(THEORIES)) + "|\n"
    for row in rows:
        unit = row["seed to seed"]
        cells = [f"{row[name] / unit:.2f}" if name in row else "–" for name in THEORIES]
        text += f"| {row['architecture']} | {row['method']} | {unit:.3f} | " + " | ".join(cells) + " |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/architectures"), help="folder of one file per row")
    args = parser.parse_args()
    warnings.simplefilter("ignore", LayerCollapseWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for architecture in args.architectures:
        for method in args.methods:
            name = f"{architecture}_{method}_w{args.width}_t{args.seeds}_n{args.samples}.json"
            path = args.out / name
            if not path.exists():
                row = line(architecture, method, args)
                path.write_text(json.dumps(row))
                print(path.name, f"{row['seconds']:.0f} s", flush=True)
            rows.append(json.loads(path.read_text()))
    print(markdown(rows))


if __name__ == "__main__":
    main()
