"""Final accuracy of masks that move (RigL, SET, SRigL, gradual magnitude pruning) against static random masks.

An MLP 784-256-256-256-10 on MNIST and a small CNN on scikit-learn's digits. All but "gmp" and "srigl" have
one random mask (ERK budgets) of one set of weights, rescaled so that the signal of the sparse network has the variance
of the dense one: else static networks of 98 % do not even begin to learn. The batches are the same, too.
Intervals are Student's t over seeds, of differences over pairs of one seed.

    python benchmarks/dynamic_sparsity.py --data-root data
"""

import argparse
import gzip
import json
import statistics
import time
import warnings
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.callbacks import DynamicSparsity, PruneAtInit
from lightning_graphon.pruning import prune, rescale_


class Batches:
    """Shuffled batches of tensors in memory, in another order every epoch."""

    def __init__(self, x: Tensor, y: Tensor, size: int, seed: int) -> None:
        self.x, self.y, self.size, self.source = x, y, size, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=self.source)
        for i in range(len(self)):
            chosen = order[i * self.size : (i + 1) * self.size]
            yield self.x[chosen], self.y[chosen]


def idx(path: Path) -> Tensor:
    """A file of MNIST."""
    with gzip.open(path) as file:
        data = np.frombuffer(file.read(), np.uint8)
    axes = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i].tobytes(), "big") for i in range(axes)]
    return torch.from_numpy(data[4 + 4 * axes :].reshape(shape).copy())


def mnist(root: Path) -> list[Tensor]:
    def read(part: str) -> list[Tensor]:
        x, y = idx(root / f"{part}-images-idx3-ubyte.gz"), idx(root / f"{part}-labels-idx1-ubyte.gz")
        return [x.flatten(1).float() / 255, y.long()]

    return read("train") + read("t10k")


def digits(root: Path) -> list[Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return [x[:1200], y[:1200], x[1200:], y[1200:]]


def mlp() -> nn.Module:
    sizes = [784, 256, 256, 256, 10]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Classifier(pl.LightningModule):
    """SGD with momentum and a cosine over all steps."""

    def __init__(self, net: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.net, self.lr, self.steps = net, lr, steps

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


CASES = {"mnist": (mnist, mlp, 128, 0.1), "digits": (digits, cnn, 32, 0.05)}


def callback(module: pl.LightningModule, method: str, sparsity: float, seed: int, every: int) -> list[pl.Callback]:
    """What makes the network sparse; rescales its weights."""
    if method == "dense":
        return []
    if method in ("gmp", "srigl"):
        return [DynamicSparsity(method, sparsity, every_n_steps=every, seed=seed, verbose=False)]
    masks = prune(module, "random", sparsity=sparsity, allocation="erk", seed=seed)
    rescale_(module, masks)
    if method == "static random":
        return [PruneAtInit.from_masks(masks, verbose=False)]
    return [DynamicSparsity(method, start=masks, every_n_steps=every, seed=seed, verbose=False)]


def accuracy(case: str, root: Path, method: str, sparsity: float, seed: int, epochs: int, every: int):
    load, build, size, lr = CASES[case]
    x, y, test_x, test_y = load(root)
    torch.manual_seed(seed)
    batches = Batches(x, y, size, seed)
    module = Classifier(build(), lr, epochs * len(batches))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=callback(module, method, sparsity, seed, every),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, batches)
    with torch.no_grad():
        return 100 * (module.net(test_x).argmax(1) == test_y).double().mean().item(), time.perf_counter() - start


def interval(values: list[float]) -> str:
    """Mean and half the width of the 95 % interval."""
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="the four files of MNIST, gzipped")
    parser.add_argument("--cases", nargs="+", default=["digits"], choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=["static random", "rigl"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.98])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=0, help="0: 10 on MNIST, 60 on digits")
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the single figures")
    args = parser.parse_args()
    found, warned = {}, warnings.catch_warnings()
    with warned:
        warnings.simplefilter("ignore")
        print("| data | sparsity | method | accuracy, % | minus the first | seconds |\n|---|---|---|---|---|---|")
        for case in args.cases:
            epochs = args.epochs or {"mnist": 10, "digits": 60}[case]
            for sparsity in args.sparsities:
                for method in args.methods:
                    runs = [
                        accuracy(case, args.data_root, method, sparsity, seed, epochs, args.every)
                        for seed in range(args.seeds)
                    ]
                    scores = found[f"{case} {sparsity} {method}"] = [score for score, _ in runs]
                    first = found[f"{case} {sparsity} {args.methods[0]}"]
                    gain = interval([a - b for a, b in zip(scores, first, strict=True)]) if scores is not first else ""
                    seconds = statistics.median(seconds for _, seconds in runs)
                    print(
                        f"| {case} | {sparsity} | {method} | {interval(scores)} | {gain} | {seconds:.1f} |", flush=True
                    )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
