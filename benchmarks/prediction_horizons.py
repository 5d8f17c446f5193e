"""For how many steps predictions made before training hold, on MNIST, and what they cost.

784-256-256-256-10 ReLU, He initialisation, batch 64, 90 % pruned, a pool of 2048 training samples, a probe of 512
others. Medians over seeds of the first step (read every 5) at which a curve is 10 % / 25 % off the observed loss of the
probe. `other order` is a second training on the same data; the rehearsal is the mean of two orders of batches, as in
LossDecayMonitor.

    python benchmarks/prediction_horizons.py --data folder/with/the/four/gz/files --seeds 3
"""

import argparse
import gzip
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _timing import interleaved, machine, report
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_graphon.dynamics import (
    PoolBatches,
    PredictedLoss,
    Training,
    power_law,
    rehearse,
    replay,
    taylor_expand,
)
from lightning_graphon.pruning import prune

BATCH, POOL, PROBE, SCORED, EVERY = 64, 2048, 512, 512, 5
Optimizers = Callable[[nn.Module], tuple[Optimizer, dict[str, Any]]]


def adamw(model: nn.Module) -> tuple[Optimizer, dict[str, Any]]:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    return optimizer, {"schedulers": [cosine], "clip_grad_norm": 1.0}


OPTIMIZERS: dict[str, Optimizers] = {
    "Adam 1e-3": lambda model: (torch.optim.Adam(model.parameters(), 1e-3), {}),
    "AdamW 3e-4, cosine, clipping": adamw,
    "SGD 0.01": lambda model: (torch.optim.SGD(model.parameters(), 0.01), {}),
}


def mnist(folder: Path) -> tuple[Tensor, Tensor]:
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        images = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8)
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8)
    return (images.view(-1, 784).float() / 255 - 0.1307) / 0.3081, labels.long()


def network(seed: int, width: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise([784, width, width, width, 10]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def training_of(method: str, optimizer: Optimizers, data: Any, seed: int, width: int) -> Training:
    model = network(seed, width)
    masks = None
    if method != "dense":
        batches = [tuple(x[:SCORED] for x in data)]
        masks = prune(model, method, sparsity=0.9, batches=batches, loss_fn=F.cross_entropy, seed=seed)
    made, settings = optimizer(model)
    return Training(model, made, loss, masks=masks, **settings)


def curves(training: Training, data: Any, seed: int, steps: int) -> dict[str, PredictedLoss]:
    """What happens and what is predicted, on the same probe."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    probe, pool, rest = (tuple(x[part] for x in data) for part in order.tensor_split([PROBE, PROBE + POOL]))
    asked = sorted({*range(20), *range(0, steps + 1, EVERY)})

    def probe_loss(model: nn.Module) -> Tensor:
        return loss(model, probe)

    true = PoolBatches(rest, BATCH, orders=2, seed=seed)
    trained = rehearse(training, true, probe_loss, asked)
    observed, other = (PredictedLoss("observed", trained.steps, row[None]) for row in trained.losses)
    batches = PoolBatches(pool, BATCH, seed=seed)
    return {
        "observed": observed,
        "other order (floor)": other,
        "rehearsal": rehearse(training, PoolBatches(pool, BATCH, orders=2, seed=seed), probe_loss, asked),
        "replay": replay(training, batches, probe_loss, asked),
        "replay, order 2": replay(training, batches, probe_loss, asked, order=2),
        "power law of 20": PredictedLoss(
            "power law", observed.steps, power_law(range(20), observed.mean[:20], asked)[None]
        ),
    }


def horizon(curve: PredictedLoss, observed: PredictedLoss, tolerance: float, steps: int) -> int:
    """First step at which a curve is further off than allowed; the last where it never is."""
    for step, a, b in zip(curve.steps.tolist(), curve.mean.tolist(), observed.mean.tolist(), strict=False):
        if step % EVERY == 0 and not abs(a - b) <= tolerance * b:
            return step
    return steps if curve.until == observed.until else curve.until or 0


def horizons(method: str, name: str, data: Any, args: argparse.Namespace) -> dict[str, str]:
    """Curve -> its horizons."""
    found: dict[str, list[tuple[int, int]]] = {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        made = curves(training_of(method, OPTIMIZERS[name], data, seed, args.width), data, seed, args.steps)
        observed = made.pop("observed")
        for key, curve in made.items():
            found.setdefault(key, []).append(
                (horizon(curve, observed, 0.1, args.steps), horizon(curve, observed, 0.25, args.steps))
            )
    return {key: f"{median(a for a, _ in v):g} / {median(b for _, b in v):g}" for key, v in found.items()}


def costs(data: Any, width: int) -> None:
    """Seconds of a step of training, and of one of its expansions."""
    training = training_of("snip", OPTIMIZERS["Adam 1e-3"], data, 0, width)
    batch = tuple(x[:BATCH] for x in data)
    runs: dict[str, Callable[[], object]] = {}
    for name, order in (("training", 0), ("replay", 1), ("replay, order 2", 2)):
        copied = training.copy()
        if order:
            copied.model = taylor_expand(copied.model, order)
            copied.optimizer = type(copied.optimizer)(copied.model.parameters(), 1e-3)
        runs[name] = lambda run=copied: list(run.run([batch] * 20))
    report("20 steps", interleaved(runs, 9), "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's gz files")
    parser.add_argument("--methods", nargs="+", default=["snip"])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    data = mnist(args.data)
    for number, (method, name) in enumerate(product(args.methods, args.optimizers)):
        cells = horizons(method, name, data, args)
        if number == 0:
            print("| | " + " | ".join(cells) + " |\n" + "|---" * (len(cells) + 1) + "|")
        print(f"| {method}, {name} | " + " | ".join(cells.values()) + " |", flush=True)
    print(machine())
    costs(data, args.width)


if __name__ == "__main__":
    main()
