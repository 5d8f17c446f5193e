"""Is what a mask is, for training, its graphon? The Graphon Limit Hypothesis of arXiv:2510.17515 tested on loss curves.

Prunes MLPs, trains each for some hundred steps, and trains beside it: the same network with another order of batches,
another seed of the method, networks redrawn from its graphons (with fewer bins, or without some of their fields), one
with its degrees only, narrower ones drawn from the graphons or pruned anew, and what both say of the full width. How
far is each loss curve from the network's? Every run is one row of a table, so that a stopped one goes on where it was.

    python examples/graphon_explains_training.py --quick
    python examples/graphon_explains_training.py --data mnist --data-root DIR --methods snip synflow --widths 512
"""

import argparse
import copy
import csv
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from image_data import add_data_arguments, images
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.dynamics import extrapolate_widths, redraw_from_graphons, sibling_optimizer
from lightning_graphon.plots import new_figure
from lightning_graphon.pruning import LayerCollapseWarning, Masks, prune, rescale_

METHODS = ("random", "magnitude", "snip", "grasp", "synflow")
RESCALED = ("random", "magnitude")  # little signal gets through what they leave, unless it is rescaled
OPTIMIZERS = {"sgd": lambda p: torch.optim.SGD(p, lr=0.01), "adam": lambda p: torch.optim.Adam(p, lr=1e-3)}
BINS, RATIOS, SAME_WIDTH = (64, 16, 4, 1), (0.5, 0.25, 0.125), "redrawn: W, E, D, 64 bins"
REFERENCE, PAIR = "the network", (0.25, 0.125)
QUICK: dict[str, Any] = {
    "widths": [128], "sparsities": [0.8], "seeds": 2, "steps": 60, "methods": ["snip", "synflow"],
    "optimizers": ["adam"],
}  # fmt: skip
FULL: dict[str, Any] = {
    "widths": [256, 512, 1024], "sparsities": [0.8, 0.9, 0.95], "seeds": 5, "steps": 200, "methods": list(METHODS),
    "optimizers": list(OPTIMIZERS),
}  # fmt: skip
Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class Network(NamedTuple):
    """What is pruned."""

    method: str
    sparsity: float
    width: int
    seed: int


class Run(NamedTuple):
    """One training; `arm` says of what, `draw` counts narrow networks, which are drawn several times."""

    network: Network
    optimizer: str
    arm: str
    draw: int = 0


# ---- arms


def redraws() -> dict[str, dict[str, Any]]:
    """Arm -> arguments of `redraw_from_graphons`."""
    found: dict[str, dict[str, Any]] = {f"redrawn: W, E, D, {bins} bins": {"bins": bins} for bins in BINS}
    found |= {"redrawn: W, E, 64 bins": {"fields": "WE"}, "redrawn: W, 64 bins": {"fields": "W"}}
    found["degrees without joint order"] = {"fields": "degrees"}
    return found | {f"redrawn, width x {ratio:g}": {"width": ratio} for ratio in RATIOS}


ARMS = (
    REFERENCE, "other batch order", "other seed", *redraws(), *(f"pruned anew, width x {ratio:g}" for ratio in RATIOS),
)  # fmt: skip
EXTRAPOLATED = ("redrawn", "pruned anew")


def mlp(inputs: int, width: int, seed: int) -> nn.Sequential:
    """A ReLU network with three hidden layers, He's initialisation."""
    torch.manual_seed(seed)
    sides = [inputs, width, width, width]
    hidden = [layer for a, b in pairwise(sides) for layer in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*hidden, nn.Linear(width, 10))
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


def pruned(network: Network, pool: tuple[Tensor, Tensor]) -> tuple[nn.Sequential, Masks]:
    """A network with its masks applied."""
    net = mlp(pool[0].shape[1], network.width, network.seed)
    batch = (pool[0][:512], pool[1][:512])
    masks = prune(net, network.method, sparsity=network.sparsity, batches=[batch], seed=network.seed)
    masks.apply_(net)
    if network.method in RESCALED:
        rescale_(net, masks, by="unit")
    return net, masks


class Arms:
    """The networks of one pruned network's arms; each is pruned or drawn when it is asked for."""

    def __init__(self, network: Network, pool: tuple[Tensor, Tensor]) -> None:
        self.network, self.pool = network, pool
        self._pruned: dict[Network, tuple[nn.Sequential, Masks]] = {}
        self.net, self.masks = self._once(network)

    def _once(self, network: Network) -> tuple[nn.Sequential, Masks]:
        """Pruned once for all optimizers; a copy to train."""
        if network not in self._pruned:
            self._pruned[network] = pruned(network, self.pool)
        net, masks = self._pruned[network]
        return copy.deepcopy(net), masks

    def build(self, arm: str, optimizer: str, draw: int = 0) -> tuple[nn.Module, Masks, torch.optim.Optimizer]:
        """Network, masks and optimizer of an arm."""
        net, masks = copy.deepcopy(self.net), self.masks
        if arm == "other seed":
            net, masks = self._once(self.network._replace(seed=self.network.seed + 1000))
        if arm in redraws() or arm.startswith("pruned anew"):
            return self._sibling(arm, optimizer, self.network.seed + 100 * draw)
        return net, masks, OPTIMIZERS[optimizer](net.parameters())

    def _sibling(self, arm: str, optimizer: str, seed: int) -> tuple[nn.Module, Masks, torch.optim.Optimizer]:
        ratio = float(arm.rpartition("x ")[2]) if " x " in arm else 1.0
        options = redraws().get(arm, {"width": ratio})
        drawn = redraw_from_graphons(self.net, self.masks, seed=seed, **options)
        if arm.startswith("pruned anew"):
            side = max(1, round(ratio * self.network.width))
            narrow = self.network._replace(width=side, seed=seed + 10_000)
            net, masks = self._once(narrow)
            drawn = replace(drawn, model=net, masks=masks)  # with the learning rates of that width
        given = OPTIMIZERS[optimizer](self.net.parameters())
        return drawn.model, drawn.masks, sibling_optimizer(given, self.net, drawn)


# ---- training


def split(data: str, root: Path, seed: int) -> Data:
    """Pool and probe, disjoint draws, of pixels with mean 0 and variance 1."""
    inputs, labels = images(data, root)
    inputs = (inputs - inputs.mean()) / inputs.std()
    probe = 512
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: 2048 + probe]
    seen, held = order[probe:], order[:probe]
    return (inputs[seen], labels[seen]), (inputs[held], labels[held])


def batches(count: int, seed: int) -> Iterator[Tensor]:
    """Indices of 64 samples, in a new order each epoch."""
    source = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=source)[: count // 64 * 64].view(-1, 64)


def train(
    net: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer, data: Data, steps: int, every: int, order: int
) -> list[float]:
    """Loss of the probe before each `every`-th step, and at the end."""
    (inputs, labels), probe = data
    losses, pairs = [], masks.pairs(net)
    for step, chosen in zip(range(steps + 1), batches(len(labels), order), strict=False):
        if step % every == 0 or step == steps:
            with torch.no_grad():
                losses.append(F.cross_entropy(net(probe[0]), probe[1]).item())
        optimizer.zero_grad()
        F.cross_entropy(net(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in pairs:
                weight.mul_(mask)
    return losses


# ---- all runs, resumable


def runs(args: argparse.Namespace) -> dict[Network, list[Run]]:
    """All runs by network; a whole seed first, so that a stopped experiment has every arm."""
    networks = [Network(m, s, w, seed) for seed, w, s, m in product(
        range(args.seeds), args.widths, args.sparsities, args.methods)]  # fmt: skip
    arms = [(arm, draw) for arm in ARMS for draw in range(args.draws if " x " in arm else 1)]
    return {n: [Run(n, o, *arm) for o, arm in product(args.optimizers, arms)] for n in networks}


def read(path: Path) -> dict[Run, list[float]]:
    """Loss curves of the runs that are there."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["losses"]]
    return {
        Run(
            Network(row["method"], float(row["sparsity"]), int(row["width"]), int(row["seed"])),
            row["optimizer"],
            row["arm"],
            int(row["draw"]),
        ): [float(loss) for loss in row["losses"].split()]
        for row in rows
    }


FIELDS = ("method", "sparsity", "width", "seed", "optimizer", "arm", "draw", "seconds", "losses")


def write(path: Path, run: Run, seconds: float, losses: list[float]) -> None:
    """One more row."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        if new:
            table.writerow(FIELDS)
        curve = " ".join(f"{loss:.6g}" for loss in losses)
        table.writerow([*run.network, run.optimizer, run.arm, run.draw, f"{seconds:.2f}", curve])


def finish(args: argparse.Namespace, console: Console) -> dict[Run, list[float]]:
    """Do the runs that are not there yet; returns all curves."""
    path = args.out / f"runs_{args.data}_{args.steps}steps_every{args.every}.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    done, plan = read(path), runs(args)
    total, left = sum(map(len, plan.values())), sum(run not in done for group in plan.values() for run in group)
    console.print(f"{total} runs, {total - left} of them already in {path}")
    try:
        for network, group in plan.items():
            for run, seconds, losses in _group(network, [run for run in group if run not in done], args):
                write(path, run, seconds, losses)
                left -= 1
                console.print(f"{left} left: {network}, {run.optimizer}, {run.arm}: {losses[-1]:.3f} ({seconds:.1f} s)")
    except KeyboardInterrupt:
        console.print(f"Stopped, {left} runs left. What is done is kept: the same command goes on from here.")
        raise SystemExit(130) from None
    return read(path)


def _group(network: Network, todo: list[Run], args: argparse.Namespace) -> Iterator[tuple[Run, float, list[float]]]:
    if not todo:
        return
    data = split(args.data, args.data_root, network.seed)
    arms = Arms(network, data[0])
    for run in todo:
        start = time.perf_counter()
        net, masks, optimizer = arms.build(run.arm, run.optimizer, run.draw)
        order = 1000 * network.seed + (1 + run.draw if run.arm != REFERENCE else 0)
        losses = train(net, masks, optimizer, data, args.steps, args.every, order)
        yield run, time.perf_counter() - start, losses


# ---- what is said of them


class Distance(NamedTuple):
    """Median over seeds of the median |log error| over steps, with the bounds of 95 % of bootstrap samples."""

    median: float
    low: float
    high: float


Table = dict[tuple[str, float, int, str], dict[str, Distance]]


def distances(curves: Mapping[Run, list[float]], args: argparse.Namespace) -> Table:
    """(method, sparsity, width, optimizer) -> arm -> distance to the network's own curve."""
    found: Table = {}
    for key in product(args.methods, args.sparsities, args.widths, args.optimizers):
        method, sparsity, width, optimizer = key
        seeds = [
            {
                (run.arm, run.draw): torch.tensor(curve)
                for run, curve in curves.items()
                if (run.network, run.optimizer) == (Network(method, sparsity, width, seed), optimizer)
            }
            for seed in range(args.seeds)
        ]
        errors = [
            {arm: log_error(curve, s[REFERENCE, 0]) for arm, curve in with_limits(s, args.draws).items()} for s in seeds
        ]
        found[key] = {arm: interval([e[arm] for e in errors]) for arm in errors[0] if arm != REFERENCE}
    return found


def with_limits(curves: Mapping[tuple[str, int], Tensor], draws: int) -> dict[str, Tensor]:
    """One curve of each arm, and those extrapolated from two widths: of the means over draws, as chance grows too."""
    found = {arm: curves[arm, 0] for arm in ARMS}
    for kind in EXTRAPOLATED:
        wider, narrower = (
            torch.stack([curves[f"{kind}, width x {ratio:g}", draw] for draw in range(draws)]).log().mean(0).exp()
            for ratio in PAIR
        )
        limit = extrapolate_widths(wider.nan_to_num(torch.inf), narrower.nan_to_num(torch.inf), PAIR)
        found[f"{kind}, extrapolated from x {PAIR[0]:g} and x {PAIR[1]:g}"] = limit
    return found


def log_error(curve: Tensor, reference: Tensor) -> float:
    """Median over steps of |log L - log L_0|; the largest number for a curve that left all bounds."""
    error = (curve.double().log() - reference.double().log()).abs()
    return float(torch.nan_to_num(error, nan=torch.inf).median())


def interval(values: list[float], samples: int = 2000) -> Distance:
    """Median and its bootstrap interval over seeds."""
    numbers = np.random.default_rng(0)
    drawn = np.median(numbers.choice(values, (samples, len(values))), axis=1)
    return Distance(float(np.median(values)), *(float(q) for q in np.quantile(drawn, [0.025, 0.975], method="nearest")))


def markdown(table: Table) -> str:
    """A row for each arm, a column for each setting."""
    keys = list(table)
    head = [f"{m}, {s:.0%} pruned, width {w}, {o}" for m, s, w, o in keys]
    lines = ["| trained beside the network | " + " | ".join(head) + " |", "|---" * (len(keys) + 1) + "|"]
    for arm in next(iter(table.values())):
        cells = (f"{d.median:.3f} ({d.low:.3f} to {d.high:.3f})" for d in (table[key][arm] for key in keys))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(table: Table, args: argparse.Namespace, sparsity: float, width: int) -> Path:
    """Distances of one sparsity and width: a panel for each method, an arm each row, a colour for each optimizer."""
    arms = list(next(iter(table.values())))
    figure, axes = new_figure(1, len(args.methods), cell=(2.2 + 4.5 / len(args.methods), 5.2))  # the names need room
    for axis, method in zip(axes[0], args.methods, strict=True):
        for i, optimizer in enumerate(args.optimizers):
            points = [table[method, sparsity, width, optimizer][arm] for arm in arms]
            middle = np.array([p.median for p in points]).clip(5e-4, 3)
            ends = np.array([[p.low, p.high] for p in points]).T.clip(5e-4, 3)
            bars = np.abs(ends - middle)
            place = np.arange(len(arms)) + 0.25 * i
            axis.errorbar(middle, place, xerr=bars, fmt="o", ms=4, color=f"C{i}", capsize=2, label=optimizer)
        axis.set(title=method, xscale="log", xlabel="median |log error| of the loss")
        ticks = [0.001, 0.01, 0.1, 1]
        axis.set_xlim(5e-4, 3)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_yticks(range(len(arms)), arms if axis is axes[0, 0] else [], fontsize=7)
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    title = "How far is the loss curve from the pruned network's?\nBars: 95 % by bootstrap over seeds"
    figure.suptitle(f"{title}\n{args.data}, {sparsity:.0%} pruned, width {width}, {args.seeds} seeds", fontsize=10)
    path: Path = args.out / f"distances_s{100 * sparsity:g}_w{width}.png"
    figure.savefig(path, dpi=120)
    return path


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; --quick changes the defaults only."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small networks and few runs: less than a minute")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--sparsities", type=float, nargs="+", help="fraction of weights removed")
    parser.add_argument("--widths", type=int, nargs="+", help="neurons in each of three hidden layers")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), help="SGD 0.01, Adam 0.001")
    parser.add_argument("--seeds", type=int, help="networks for each setting")
    parser.add_argument("--steps", type=int, help="of training, 64 samples each")
    parser.add_argument("--draws", type=int, default=3, help="networks of each narrower width, averaged to extrapolate")
    parser.add_argument("--every", type=int, default=5, help="steps from one measured loss to the next")
    add_data_arguments(parser, "graphon_explains_training")
    parser.set_defaults(**(QUICK if parser.parse_args(argv).quick else FULL))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Table:
    """Run what is missing, write table and pictures; returns the distances."""
    args = parse(argv)
    warnings.simplefilter("ignore", LayerCollapseWarning)  # a narrow network may lose a layer; its curve shows it
    console = Console()
    table = distances(finish(args, console), args)
    path = args.out / "distances.md"
    path.write_text(markdown(table), encoding="utf-8")
    console.print(path.read_text(encoding="utf-8"), markup=False, soft_wrap=True)
    for file in (path, *(draw(table, args, s, w) for s, w in product(args.sparsities, args.widths))):
        console.print(file)
    return table


if __name__ == "__main__":
    main()
