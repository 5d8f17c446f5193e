"""Where do masks that move go? The flow of graphons under SET and RigL, and whether its end is a lottery ticket.

Trains sparse networks (an MLP on MNIST, a CNN on scikit-learn's digits) from random, SNIP and SynFlow masks of equal
layer densities: with masks that stay, with SET, with RigL. Follows the graphon of every layer, measures tangent
kernels, and trains from the start what RigL has found: its last masks, masks drawn from their graphons, masks of the
same degrees. Every network is one file, so that a stopped run goes on where it was.

    python examples/graphon_flow.py --quick
    python examples/graphon_flow.py --cases digits mnist --data-root DIR
"""

import argparse
import copy
import csv
import time
from collections.abc import Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from graphon_flow_figures import draw, layers
from image_data import images
from resumable import finish
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.graphon import LayerFlow, estimate_graphon, layer_graphons
from lightning_graphon.ntk import empirical_ntk, kernel_ridge_regression, kernel_target_alignment
from lightning_graphon.pruning import Enforcer, GrowthConfig, Masks, MaskUpdater, prune, rescale_

STARTS, MOVING = ("random", "snip", "synflow"), ("static", "set", "rigl")
# Masks that stay from the start, made of the last ones of RigL from a random start, or of SynFlow's as a comparison.
TICKETS = ("exact", "graphon 16", "graphon 4", "degrees")
BINS = 16
FULL: dict[str, Any] = {"seeds": 5, "epochs": {"digits": 40, "mnist": 10}, "every": 50, "probe": 160}
QUICK: dict[str, Any] = {"seeds": 2, "epochs": {"digits": 4, "mnist": 1}, "every": 20, "probe": 64}
RATES, BATCH, HELD_OUT = {"digits": 0.05, "mnist": 0.1}, {"digits": 32, "mnist": 128}, {"digits": 597, "mnist": 5000}
TRAINING = {"digits": 1200, "mnist": 20_000}
Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class Cell(NamedTuple):
    """One training."""

    case: str
    sparsity: float
    seed: int
    method: str
    start: str

    @property
    def stem(self) -> str:
        """Name of its file."""
        start = self.start.replace(" ", "_")
        return f"{self.case}_s{100 * self.sparsity:g}_t{self.seed}_{self.method}_{start}"


def cells(args: argparse.Namespace) -> list[Cell]:
    """All trainings, a whole seed first: a stopped run has every arm. Tickets come after what they are made of."""
    arms = [*product(MOVING, STARTS), *(("ticket", kind) for kind in TICKETS)]
    grid = product(range(args.seeds), args.cases, args.sparsities, arms)
    return [Cell(case, sparsity, seed, *arm) for seed, case, sparsity, arm in grid]


# ---- networks and data


def network(case: str, seed: int) -> nn.Sequential:
    """784-256-256-256-10 for MNIST, three convolutions for digits."""
    torch.manual_seed(seed)
    if case == "mnist":
        sides = [784, 256, 256, 256]
        hidden = [layer for a, b in pairwise(sides) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(256, 10))
    sides, layers = [1, 32, 64, 64], []
    for (a, b), stride in zip(pairwise(sides), (1, 2, 2), strict=True):
        layers += [nn.Conv2d(a, b, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(256, 10))


def split(case: str, root: Path) -> Data:
    """What is trained on and what is held out, the same for all seeds."""
    inputs, labels = images(case, root)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    seen, held = order[HELD_OUT[case] :][: TRAINING[case]], order[: HELD_OUT[case]]
    return (inputs[seen], labels[seen]), (inputs[held], labels[held])


# ---- masks to start with


def first_masks(net: nn.Module, cell: Cell, data: Data, folder: Path) -> Masks:
    """All have the same number of weights in each layer, those of ERK."""
    if cell.method != "ticket":
        batch = tuple(part[:512] for part in data[0])
        return prune(net, cell.start, sparsity=cell.sparsity, allocation="erk", batches=[batch], seed=cell.seed)
    source = cell._replace(method="rigl", start="random")
    found = _load_masks(net, folder / f"{source.stem}.npz")
    if cell.start == "exact":
        return found
    if cell.start == "degrees":
        return Masks({name: same_degrees(mask, cell.seed) for name, mask in found.items()})
    graphons = layer_graphons(found, order="joint", bins=int(cell.start.split()[1]))
    budget = {name: 1 - float(mask.double().mean()) for name, mask in found.items()}
    return prune(
        net, "graphon", sparsity=cell.sparsity, allocation=budget, seed=cell.seed + 1000, options={"graphons": graphons}
    )


def _load_masks(net: nn.Module, path: Path) -> Masks:
    stored, shapes = np.load(path), {name: p.shape for name, p in net.named_parameters()}
    names = [key.removeprefix("mask/") for key in stored if key.startswith("mask/")]
    return Masks({n: torch.from_numpy(stored[f"mask/{n}"]).reshape(shapes[n]) for n in names})


def same_degrees(mask: Tensor, seed: int, trades: int = 20) -> Tensor:
    """A random mask with the degrees of each output and of each input (and tap), by curveball trades.

    Two outputs trade those inputs that only one of them has, in random parts of the sizes that they had (Strona et al.
    2014); each output does so about `trades` times.
    """
    random, rows = np.random.default_rng(seed), mask.flatten(1).numpy().copy()
    for _ in range(trades * len(rows) // 2):
        a, b = random.choice(len(rows), 2, replace=False)
        only = np.flatnonzero(rows[a] ^ rows[b])
        own = int(rows[a][only].sum())
        random.shuffle(only)
        rows[a][only[:own]], rows[b][only[:own]] = True, False
        rows[a][only[own:]], rows[b][only[own:]] = False, True
    return torch.from_numpy(rows).reshape(mask.shape)


# ---- training


def train(
    net: nn.Sequential, masks: Masks, cell: Cell, data: Data, args: argparse.Namespace
) -> tuple[dict[str, LayerFlow], dict[str, list[Tensor]]]:
    """Train in place under masks, which are written to where they move.

    Returns:
        The flow of each layer, units where they stood; and its graphon at each look, sorted anew by degree.
    """
    (inputs, labels), size = data[0], BATCH[cell.case]
    steps = args.epochs[cell.case] * (len(labels) // size)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATES[cell.case], momentum=0.9, weight_decay=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    moving = GrowthConfig(cell.method if cell.method in MOVING[1:] else "set", every_n_steps=args.every)
    updater = MaskUpdater(net, masks, moving, moving.schedule(steps), seed=cell.seed)
    flows = {name: LayerFlow(mask.clone(), bins=BINS) for name, mask in masks.items()}
    looks = {name: [sorted_graphon(mask)] for name, mask in masks.items()}
    order = torch.Generator().manual_seed(cell.seed)
    with Enforcer(net, masks, optimizer) as enforcer:
        for step in range(steps):
            if step % (len(labels) // size) == 0:
                shuffled = torch.randperm(len(labels), generator=order).split(size)
            chosen = shuffled[step % (len(labels) // size)]
            if updater.needs_gradients and cell.method == "rigl":
                enforcer.collect_gradients()
            optimizer.zero_grad()
            F.cross_entropy(net(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
            cosine.step()
            if updater.step() and cell.method in MOVING[1:]:
                weights = {name: net.get_parameter(name).detach() for name in masks}
                enforcer.update(updater.update(weights, enforcer.take_gradients(), masks))
                for name, mask in masks.items():
                    flows[name].look(mask.clone(), updater.steps)
                    looks[name].append(sorted_graphon(mask))
    return flows, looks


def sorted_graphon(mask: Tensor) -> Tensor:
    """Cells of the graphon of a mask."""
    return estimate_graphon(mask, BINS).values.float()


def kernel_numbers(net: nn.Module, masks: Masks, data: Data, probe: int) -> list[float]:
    """Of the exact tangent kernel: accuracy of its regression on held-out images, and centred alignment with labels."""
    (inputs, labels), (test, answers) = ((x[:probe], y[:probe]) for x, y in data)
    kernel = empirical_ntk(net, torch.cat([inputs, test]), masks=masks).double()
    seen = kernel[:probe, :probe]
    ridge = 1e-3 * float(seen.diagonal().mean())
    outputs = kernel_ridge_regression(seen, labels, kernel[probe:, :probe], ridge)
    accuracy = float((outputs.argmax(1) == answers).double().mean())
    return [accuracy, kernel_target_alignment(seen, labels, centred=True)]


def compute(cell: Cell, args: argparse.Namespace, folder: Path) -> dict[str, np.ndarray]:
    """One training, as arrays."""
    started, data = time.perf_counter(), split(cell.case, args.data_root)
    net = network(cell.case, cell.seed)
    masks = Masks({name: mask.clone() for name, mask in first_masks(net, cell, data, folder).items()})
    start, dense = Masks({name: mask.clone() for name, mask in masks.items()}), copy.deepcopy(net)
    rescale_(net, masks)
    kernels = [kernel_numbers(net, masks, data, args.probe)]
    flows, looks = train(net, masks, cell, data, args)
    rescale_(dense, masks)  # the first weights, under the last masks
    kernels.append(kernel_numbers(dense, masks, data, args.probe) if masks != start else kernels[0])
    kernels.append(kernel_numbers(net, masks, data, args.probe))
    with torch.no_grad():
        (seen, labels), (held, answers) = data
        found: dict[str, Any] = {
            "accuracy": float((net(held).argmax(1) == answers).double().mean()),
            "loss": float(F.cross_entropy(net(seen), labels)),
            "kernel": np.array(kernels),  # [first masks, last masks at first weights, last masks and weights; 2]
        }
    for name, flow in flows.items():
        found |= {f"mask/{name}": masks[name].numpy(), f"cells/{name}": _three(flow)}
        found |= {f"start/{name}": start[name].numpy(), f"looks/{name}": torch.stack(looks[name]).numpy()}
        found[f"path/{name}"] = np.array([_numbers(point) for point in flow.points])
        found[f"degrees/{name}"] = np.stack([torch.cat([p.row_degrees, p.col_degrees]).numpy() for p in flow.points])
    found["revived"] = sum(point.revived for flow in flows.values() for point in flow.points)
    return {**found, "seconds": np.array(time.perf_counter() - started)}


def _numbers(point: Any) -> list[float]:
    return [point.step, point.moved, point.by_chance, point.limit_distance, point.churn, point.dead]


def _three(flow: LayerFlow) -> np.ndarray:
    return torch.stack([p.cells for p in (flow.points[0], flow.middle, flow.points[-1])]).numpy()


# ---- what is said


Results = Mapping[Cell, Mapping[str, np.ndarray]]


def arms(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(method, start) of each arm."""
    return [*product(MOVING, STARTS), *(("ticket", kind) for kind in TICKETS)]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of the 95 % interval of Student's t."""
    from scipy.stats import t as student

    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half)


def limit(results: Results, case: str, sparsity: float, start: str, layer: str, without: int) -> np.ndarray:
    """Mean graphon of a method's own masks at these densities, sorted by degree, of the other seeds."""
    own = [
        found[f"looks/{layer}"][0]
        for cell, found in results.items()
        if cell[:2] == (case, sparsity) and cell[3:] == ("static", start) and cell.seed != without
    ]
    return np.mean(own, axis=0)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """L2 distance of two graphons on one grid of (almost) equal cells."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def table(results: Results, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each arm, and each layer of those whose masks move; also written as CSV."""
    rows = []
    for case, sparsity, (method, start) in product(args.cases, args.sparsities, arms(args)):
        found = [results[Cell(case, sparsity, seed, method, start)] for seed in range(args.seeds)]
        row: dict[str, Any] = {"case": case, "sparsity": sparsity, "method": method, "start": start, "layer": "all"}
        accuracy = [100 * float(f["accuracy"]) for f in found]
        row["accuracy"], row["accuracy_half"] = interval(accuracy)
        for name, other in (("gain", "static"), ("minus_rigl", "rigl")):
            base = [results[Cell(case, sparsity, seed, other, "random")] for seed in range(args.seeds)]
            difference = [a - 100 * float(b["accuracy"]) for a, b in zip(accuracy, base, strict=True)]
            row[name], row[f"{name}_half"] = interval(difference)
        row["loss"] = float(np.mean([f["loss"] for f in found]))
        for index, when in enumerate(("first", "last_masks", "end")):
            for column, what in enumerate(("kernel_accuracy", "alignment")):
                row[f"{what}_{when}"] = float(np.mean([f["kernel"][index, column] for f in found]))
        row["revived"] = float(np.mean([f["revived"] for f in found]))
        rows.append(row)
        if method == "ticket":
            continue
        arm = {key: row[key] for key in ("case", "sparsity", "method", "start")}
        rows += [arm | {"layer": layer} | _layer(results, args, row, layer, found) for layer in layers(found[0])]
    return rows


def _layer(results: Results, args: Any, row: Mapping[str, Any], layer: str, found: list[Any]) -> dict[str, float]:
    case, sparsity, method, start = (row[key] for key in ("case", "sparsity", "method", "start"))
    numbers: dict[str, float] = {}
    last = np.mean([f[f"path/{layer}"][-1] for f in found], axis=0)  # where nothing was exchanged there is no look
    names = ("moved", "moved_by_chance", "from_constant", "churn_last", "dead")
    numbers |= {name: float(value) for name, value in zip(names, last[1:], strict=True)}
    look, when_is = f"looks/{layer}", {"first": 0, "last": -1}
    for (when, at), target in product(when_is.items(), STARTS[1:]):
        away = [
            distance(f[look][at], limit(results, case, sparsity, target, layer, seed)) for seed, f in enumerate(found)
        ]
        numbers[f"{when}_from_{target}"] = float(np.mean(away))
    others = [s for s in STARTS if s != start]
    for when, at in when_is.items():
        pairs = [
            distance(f[look][at], results[Cell(case, sparsity, seed, method, other)][look][at])
            for seed, f in enumerate(found)
            for other in others
        ]
        numbers[f"{when}_between_starts"] = float(np.mean(pairs))
        seeds = [distance(a[look][at], b[look][at]) for a, b in pairwise(found)]
        numbers[f"{when}_between_seeds"] = float(np.mean(seeds))
    return numbers


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """All numbers as CSV."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; `--quick` changes defaults only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, few epochs: half a minute")
    parser.add_argument("--cases", nargs="+", choices=["digits", "mnist"], default=["digits"])
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where torchvision keeps MNIST")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.98])
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/graphon_flow"))
    args = parser.parse_args(argv)
    preset = QUICK if args.quick else FULL
    args.seeds, args.epochs = args.seeds or preset["seeds"], preset["epochs"]
    args.every, args.probe = preset["every"], preset["probe"]
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: intervals and limits are of several seeds")
    return args


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Do what is not there yet, write table and figures; the rows of the table."""
    args, console = parse(argv), Console()
    torch.set_num_threads(1)
    trained = "_".join(f"{case}{epochs}" for case, epochs in args.epochs.items())
    folder = args.out / "cells" / f"{trained}_every{args.every}"
    results = finish(
        folder,
        cells(args),
        stem=lambda c: c.stem,
        work=lambda c: compute(c, args, folder),
        describe=lambda c: f"{c.case}, {c.method} from {c.start}, seed {c.seed}",
        console=console,
        kind="npz",
    )
    rows = table(results, args)
    write(rows, args.out / "graphon_flow.csv")
    for path in draw(results, rows, args):
        console.print(f"written: {path}")
    return rows


if __name__ == "__main__":
    main()
