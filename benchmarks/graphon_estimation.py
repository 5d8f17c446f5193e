"""Time and error of graphon estimates where the graphon is known: ours against pygraphon in an environment of its own.

Symmetric graphs of 256 to 2048 nodes, 32 blocks; pygraphon knows no others. The error is that of the edge probabilities
P_ij = W(u_i, u_j), root mean square over pairs of nodes, so it needs no alignment. One thread, processor time.
pygraphon is not on PyPI: it is installed from its repository, or from a checkout with --pygraphon DIR.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
from _peer import peer
from _timing import machine
from torch import Tensor

from lightning_graphon.graphon import estimate_graphon
from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.estimate import memberships

BLOCKS = 32
GRAPHONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth": lambda u, v: torch.sigmoid(3 - 4 * (u + v)),  # degrees are strictly monotone
    "equal degrees": lambda u, v: torch.where((u < 0.5) == (v < 0.5), 0.6, 0.2),  # the degree says nothing
}
SOURCE = "pygraphon @ git+https://github.com/SDS-EPFL/pygraphon@68005c9"
PEER = """
import json, time
import numpy as np
from loguru import logger
from pygraphon.estimators import HistogramEstimator, NBDsmooth, SAS
logger.remove()
for line in iter(input, "stop"):
    name, path = json.loads(line)
    edges = np.load(path)
    blocks = {blocks}
    estimator = {{
        "sorting and smoothing": lambda: SAS(h=len(edges) // blocks),
        "network histogram": lambda: HistogramEstimator(bandwithHist=1 / blocks),
        "neighbourhood smoothing": NBDsmooth,
    }}[name]()
    start = time.process_time(); estimator.fit(edges); spent = time.process_time() - start
    np.save(path + ".found.npy", estimator.get_edge_connectivity())
    print(spent, flush=True)
"""
THEIRS = ["sorting and smoothing", "network histogram", "neighbourhood smoothing"]
OURS: dict[str, tuple[str, float]] = {
    "this library": ("degree", 0.0),
    "this library, smoothing=1": ("degree", 1.0),
    "this library, spectral": ("spectral", 0.0),
}


def graph(kind: str, nodes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Edges [nodes, nodes], symmetric without loops, and their probabilities."""
    source = torch.Generator().manual_seed(seed)
    u = torch.rand(nodes, generator=source, dtype=torch.float64)
    probabilities = GRAPHONS[kind](u[:, None], u).fill_diagonal_(0)
    upper = (torch.rand(nodes, nodes, generator=source) < probabilities).triu(1)
    return upper | upper.T, probabilities


def ours(edges: Tensor, order: str, smoothing: float) -> tuple[float, Tensor]:
    """Processor seconds of the estimate, and the probability of every edge by the bins of its ends."""
    start = time.process_time()
    found = estimate_graphon(edges, BLOCKS, order, smoothing=smoothing)
    spent = time.process_time() - start
    rows, cols = memberships(ChannelGraph(edges), BLOCKS, order, ties="index")
    return spent, (rows @ found.values @ cols.T).fill_diagonal_(0)


def theirs(ask: Callable[[str], str], name: str, path: str) -> tuple[float, Tensor]:
    """The same of one of pygraphon's estimators."""
    spent = float(ask(json.dumps([name, path])))
    return spent, torch.from_numpy(np.load(path + ".found.npy"))


def measure(kind: str, nodes: int, seeds: int, ask: Callable[[str], str], path: str) -> dict[str, tuple[float, float]]:
    """Estimator -> median processor seconds and median error over graphs, all estimators of a graph in turn."""
    runs: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        edges, probabilities = graph(kind, nodes, seed)
        np.save(path, edges.numpy().astype(int))
        calls = {name: partial(ours, edges, *how) for name, how in OURS.items()}
        calls |= {f"pygraphon, {name}": partial(theirs, ask, name, path) for name in THEIRS}
        for name, call in calls.items():
            spent, found = call()
            error = float((found - probabilities).square().mean().sqrt())
            runs.setdefault(name, []).append((spent, error))
    return {name: tuple(map(median, zip(*pairs, strict=True))) for name, pairs in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pygraphon", default=SOURCE, help="what pip installs: a URL, or the folder of a checkout")
    parser.add_argument("--nodes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=3, help="graphs of each kind and size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"## Graphon estimates, {BLOCKS} blocks, processor time of one thread\n\n{machine()}\n")
    print("| graphon | nodes | estimator | seconds | error |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, peer([args.pygraphon], PEER.format(blocks=BLOCKS)) as ask:
        path = str(Path(folder) / "edges.npy")
        measure("smooth", 2 * BLOCKS, 1, ask, path)  # compiles pygraphon's loops
        for nodes, kind in product(args.nodes, GRAPHONS):
            for name, (seconds, error) in measure(kind, nodes, args.repeats, ask, path).items():
                print(f"| {kind} | {nodes} | {name} | {seconds:.4f} | {error:.4f} |", flush=True)


if __name__ == "__main__":
    main()
