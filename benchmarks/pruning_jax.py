"""One-shot pruning of a 784-1024-1024-1024-1024-10 MLP to 90 %: ours against jaxpruner in an environment of its own.

Both prune the same weights with one thread and are timed by processor time, so that other work on the machine counts
little. jaxpruner is not on PyPI: it is installed from its repository, or from a checkout with --jaxpruner DIR.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from _peer import peer
from _timing import machine, report
from torch import nn

from lightning_graphon.pruning import Masks, prune

SIDES = (784, 1024, 1024, 1024, 1024, 10)
SOURCE = "git+https://github.com/google-research/jaxpruner@f133ee50f31a03d0152b8b272edb534065152f5d"
# jax.tree_map, which jaxpruner calls, was removed in jax 0.4.26; the others are the newest that go with 0.4.25.
VERSIONS = ["jax==0.4.25", "jaxlib==0.4.25", "flax==0.8.2", "optax==0.2.2", "chex==0.1.86", "numpy<2", "scipy<1.13"]
PEER = """
import os, time
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
import jax, jaxpruner, numpy as np, optax
from functools import partial
from jaxpruner.algorithms import GlobalMagnitudePruning, GlobalSaliencyPruning
from jaxpruner.sparsity_distributions import uniform
folder = {folder!r}
given = np.load(folder + "/given.npz")
params = {{name: jax.numpy.asarray(given[name]) for name in given if name not in "xy"}}
def loss(params):
    h, weights = given["x"], list(params.values())
    for w in weights[:-1]:
        h = jax.nn.relu(h @ w.T)
    return optax.softmax_cross_entropy_with_integer_labels(h @ weights[-1].T, given["y"]).mean()
by_layer = {{"sparsity_distribution_fn": partial(uniform, sparsity=0.9)}}
over_all = {{"sparsity": 0.9, "use_normalization": False}}
pruners = {{
    "random uniform": jaxpruner.RandomPruning(**by_layer),
    "magnitude uniform": jaxpruner.MagnitudePruning(**by_layer),
    "magnitude global": GlobalMagnitudePruning(**over_all),
    "snip uniform": jaxpruner.SaliencyPruning(**by_layer),
    "snip global": GlobalSaliencyPruning(**over_all),
}}
def full_tensor(pruner, params):
    needs = isinstance(pruner, jaxpruner.SaliencyPruning)
    return pruner.instant_sparsify(params, grads=jax.grad(loss)(params) if needs else None)[1]
calls = {{name: jax.jit(partial(whole, pruner)) for name, pruner in pruners.items()}}
for name in iter(input, "stop"):
    start = time.process_time(); masks = jax.block_until_ready(calls[name](params)); spent = time.process_time() - start
    np.savez(folder + "/masks.npz", **{{k: np.asarray(m, bool) for k, m in masks.items()}})
    print(spent, flush=True)
"""
CANDIDATES = ["random uniform", "magnitude uniform", "magnitude global", "snip uniform", "snip global"]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(SIDES) for layer in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def ours(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], candidate: str) -> tuple[float, Masks]:
    """Processor seconds of one call, and the masks."""
    method, allocation = candidate.split()
    start = time.process_time()
    masks = prune(net, method, sparsity=0.9, batches=[batch], allocation=allocation)
    return time.process_time() - start, masks


def compare(candidate: str, run: Callable[[], tuple[float, Masks]], ask: Callable[[str], str], masks: Path) -> str:
    """A title that says how many weights have another fate; both sides have then run once, the peer has compiled."""
    ask(candidate)
    theirs, own = np.load(masks), run()[1]
    differ = sum(int((own[name].numpy() != theirs[name]).sum()) for name in own)
    return f"{candidate}: {differ} weights of {sum(mask.numel() for mask in own.values())} differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jaxpruner", default=SOURCE, help="what pip installs: a URL, or the folder of a checkout")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, batch = mlp(), (torch.randn(256, SIDES[0]), torch.randint(10, (256,)))
    print(f"## One-shot pruning, processor time of one thread\n\n{machine()}")
    with tempfile.TemporaryDirectory() as folder:
        # Names of the layers sort in their order, as jax sorts the keys of a dict.
        arrays = {"x": batch[0], "y": batch[1]} | {name: p.detach() for name, p in net.named_parameters()}
        np.savez(Path(folder) / "given.npz", **{name: array.numpy() for name, array in arrays.items()})
        with peer([args.jaxpruner, *VERSIONS], PEER.format(folder=folder)) as ask:
            for candidate in CANDIDATES:
                run = partial(ours, net, batch, candidate)
                title = compare(candidate, run, ask, Path(folder) / "masks.npz")
                seconds: dict[str, list[float]] = {"jaxpruner": [], "this library": []}
                for _ in range(args.repeats):
                    seconds["jaxpruner"].append(float(ask(candidate)))
                    seconds["this library"].append(run()[0])
                report(title, seconds, "jaxpruner")


if __name__ == "__main__":
    main()
