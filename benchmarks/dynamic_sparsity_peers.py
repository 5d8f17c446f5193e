"""Updates of the masks of a 784-1024-1024-1024-1024-10 MLP, 90 % pruned: ours against jaxpruner and sparsimony.

All get the same weights, first masks and growth scores (gradients of RigL, uniform numbers of SET) at each of five
updates, which exchange 30 % of the weights; the masks are compared. Processor time of one thread for one update.
jaxpruner is not on PyPI: it is installed from its repository, or from a checkout with --jaxpruner DIR, in an
environment of its own. sparsimony is installed alone into a folder, and uses the torch of this environment.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _peer import peer
from _timing import machine, report
from pruning_jax import SIDES, SOURCE, VERSIONS, mlp
from torch import Tensor

from lightning_graphon.pruning import GrowthConfig, Masks, MaskUpdater, prune
from lightning_graphon.pruning.growth.registry import GrowthContext

UPDATES, FRACTION, SPARSITY = 5, 0.3, 0.9
JAX = """
import os, time
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
import jax, jaxpruner, numpy as np
from jaxpruner.algorithms import SET
folder = {folder!r}
given = {{method: dict(np.load(f"{{folder}}/{{method}}.npz")) for method in ("rigl", "set")}}
part = lambda own, kind: {{k[len(kind):]: jax.numpy.asarray(v) for k, v in own.items() if k.startswith(kind)}}
algorithm = SET()
def update_all(masks, weights, scores):
    weights = jax.tree_util.tree_map(lambda w, m: w * m, weights, masks)
    update = lambda m, w, s: algorithm._update_masks(m, abs(w), s, {fraction})
    return jax.tree_util.tree_map(update, masks, weights, scores)
update = jax.jit(update_all)
for line in iter(input, "stop"):
    method, step = line.split()
    own = given[method]
    masks = {{k: v.astype(jax.numpy.uint8) for k, v in part(own, "mask ").items()}} if step == "0" else masks
    arguments = masks, part(own, f"weight {{step}} "), part(own, f"score {{step}} ")
    jax.block_until_ready(arguments)
    start = time.process_time(); masks = jax.block_until_ready(update(*arguments)); spent = time.process_time() - start
    np.savez(folder + "/masks.npz", **{{k: np.asarray(m, bool) for k, m in masks.items()}})
    print(spent, flush=True)
"""


class Case:
    """Weights, first masks and scores of each update."""

    def __init__(self, method: str) -> None:
        self.net, self.method = mlp(), method
        self.first = dict(prune(self.net, "random", sparsity=SPARSITY, allocation="uniform"))
        source = torch.Generator().manual_seed(0)
        self.weights = [
            {n: torch.randn(m.shape, generator=source) for n, m in self.first.items()} for _ in range(UPDATES)
        ]
        self.gradients = [
            {n: torch.randn(m.shape, generator=source) for n, m in self.first.items()} for _ in range(UPDATES)
        ]
        self.config = GrowthConfig(method, every_n_steps=1, fraction=FRACTION, stop=10**9)

    def scores(self, update: int) -> dict[str, Tensor]:
        """What the largest of which grow."""
        if self.method == "rigl":
            return {name: gradient.abs() for name, gradient in self.gradients[update].items()}
        context = GrowthContext({}, self.first, update=update + 1)
        return {name: context.uniform(name) for name in self.first}

    def save(self, path: Path) -> None:
        """For another process."""
        arrays = {f"mask {name}": mask for name, mask in self.first.items()}
        for update in range(UPDATES):
            arrays |= {f"weight {update} {name}": w for name, w in self.weights[update].items()}
            arrays |= {f"score {update} {name}": s for name, s in self.scores(update).items()}
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})

    def ours(self) -> tuple[list[float], list[dict[str, Tensor]]]:
        """Seconds of each update, and the masks after it."""
        masks, found, seconds = dict(self.first), [], []
        updater = MaskUpdater(self.net, Masks(masks), self.config, self.config.schedule(10**9))
        for update in range(UPDATES):
            weights = {name: w * masks[name] for name, w in self.weights[update].items()}
            updater.step()
            start = time.process_time()
            masks = updater.update(weights, self.gradients[update], masks)
            seconds.append(time.process_time() - start)
            found.append(masks)
        return seconds, found

    def sparsimony(self) -> tuple[list[float], list[dict[str, Tensor]]]:
        """The same by the functions that its RigL and its SET call, with our numbers for SET."""
        from sparsimony.pruners.unstructured import UnstructuredGradientGrower, UnstructuredMagnitudePruner

        masks, found, seconds = {name: mask.float() for name, mask in self.first.items()}, [], []
        for update in range(UPDATES):
            weights = {name: w * masks[name] for name, w in self.weights[update].items()}
            scores, start = self.scores(update), time.process_time()
            for name, mask in masks.items():
                dropped = UnstructuredMagnitudePruner.calculate_mask(FRACTION, mask, weights[name])
                masks[name] = UnstructuredGradientGrower.calculate_mask(SPARSITY, dropped, scores[name])
            seconds.append(time.process_time() - start)
            found.append({name: mask.bool() for name, mask in masks.items()})
        return seconds, found


def differing(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> str:
    """Entries of all masks that differ, after the first and the last update."""
    first, last = (sum(int((ours[i][n] != theirs[i][n]).sum()) for n in ours[i]) for i in (0, -1))
    kept = sum(int(mask.sum()) for mask in ours[0].values())
    return f"{first:,} entries differ after the first update and {last:,} after the last, of {kept:,} weights kept"


def compare(case: Case, ask: Callable[[str], str], masks: Path, repeats: int) -> None:
    """One method, all three."""
    seconds: dict[str, list[float]] = {"jaxpruner": [], "sparsimony": [], "this library": []}
    for repeat in range(repeats + 1):
        theirs, spent = [], []
        for update in range(UPDATES):
            spent.append(float(ask(f"{case.method} {update}")))
            theirs.append({name: torch.from_numpy(mask) for name, mask in np.load(masks).items()})
        own, ours = case.ours()
        other, others = case.sparsimony()
        if repeat:  # the first compiles
            for name, times in (("jaxpruner", spent), ("sparsimony", other), ("this library", own)):
                seconds[name] += times
    title = f"{case.method}: jaxpruner: {differing(ours, theirs)}; sparsimony: {differing(ours, others)}"
    report(title, seconds, "jaxpruner")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jaxpruner", default=SOURCE, help="what pip installs: a URL, or the folder of a checkout")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"## Updates of masks, processor time of one thread, {'-'.join(map(str, SIDES))}\n\n{machine()}", flush=True)
    cases = [Case("rigl"), Case("set")]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as packages:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
        subprocess.run([*install, "sparsimony==0.1.0"], check=True)
        sys.path.append(packages)
        for case in cases:
            case.save(Path(folder) / f"{case.method}.npz")
        with peer([args.jaxpruner, *VERSIONS], JAX.format(folder=folder, fraction=FRACTION)) as ask:
            for case in cases:
                compare(case, ask, Path(folder) / "masks.npz", args.repeats)


if __name__ == "__main__":
    main()
