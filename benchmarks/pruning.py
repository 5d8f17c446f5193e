"""Time of pruning, and of keeping weights pruned, on a 784-1024-1024-1024-1024-10 MLP (3,958,784 weights)."""

import argparse
from itertools import pairwise, product

import torch
from _timing import interleaved, machine, report
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.pruning import prune, rescale_
from lightning_graphon.pruning.enforcer import Enforcer
from lightning_graphon.pruning.scoring import registry as methods

SIDES = (784, 1024, 1024, 1024, 1024, 10)
# Seconds of the reference implementation on 2 cores of an AMD EPYC, minimum of several runs.
REFERENCE = {"random": 0.090, "magnitude": 0.066, "snip": 0.102, "grasp": 0.254, "synflow": 9.355}


def mlp() -> nn.Sequential:
    layers = [layer for a, b in pairwise(SIDES) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def by_sorting_everything(net: nn.Sequential, density: float, rounds: int = 100) -> list[Tensor]:
    """SynFlow with one `kthvalue` over all scores in each round, in float32: the plain way."""
    weights = [m.weight for m in net if isinstance(m, nn.Linear)]
    originals = {p: p.data for p in net.parameters()}
    masks = [torch.ones_like(w) for w in weights]
    total = sum(w.numel() for w in weights)
    for step in range(1, rounds + 1):
        for p, data in originals.items():
            p.data = data.abs()
        for w, mask in zip(weights, masks, strict=True):
            w.data *= mask
        grads = torch.autograd.grad(net(torch.ones(1, SIDES[0])).sum(), weights)
        scores = [(w.data * g).abs() for w, g in zip(weights, grads, strict=True)]
        removed = int((1 - density ** (step / rounds)) * total)
        threshold = torch.cat([s.flatten() for s in scores]).kthvalue(removed).values
        masks = [torch.where(s <= threshold, 0.0, 1.0) for s in scores]
    for p, data in originals.items():
        p.data = data
    return masks


def time_methods(repeats: int) -> None:
    net, batch = mlp(), (torch.randn(256, 784), torch.randint(10, (256,)))
    candidates = {
        name: (lambda name=name: prune(net, name, sparsity=0.9, batches=[batch]))
        for name in methods()
        if name in REFERENCE
    }
    seconds = interleaved(candidates, repeats)
    print("\n### One call of `prune`, sparsity 0.9, SynFlow with 100 rounds\n")
    print("| method | minimum (s) | reference, as published (s) | ratio |\n|---|---|---|---|")
    for name, runs in seconds.items():
        print(f"| {name} | {min(runs):.3f} | {REFERENCE[name]} | {min(runs) / REFERENCE[name]:.2f} |")


def time_synflow(repeats: int) -> None:
    net = mlp()
    candidates = {
        "plain: kthvalue over all scores, float32": lambda: by_sorting_everything(net, 0.1),
        "this library, float64": lambda: prune(net, "synflow", sparsity=0.9),
        "this library, float32": lambda: prune(net, "synflow", sparsity=0.9, options={"double": False}),
    }
    report("SynFlow, 100 rounds", interleaved(candidates, repeats, warmup=0), next(iter(candidates)))


class Training:
    """One network, one optimizer, one step at a time."""

    def __init__(self, optimizer: str, batch_size: int, masked: bool, **options: bool) -> None:
        torch.manual_seed(0)
        self.net = mlp()
        self.batch = (torch.randn(batch_size, 784), torch.randint(10, (batch_size,)))
        # Standing still: on one batch both networks would soon have no gradient left, and not at the same time.
        self.optimizer = getattr(torch.optim, optimizer)(self.net.parameters(), lr=1e-12, **options)
        if masked:
            # Uniform and rescaled, so that signals reach every layer as they do in the dense network. Where they do
            # not, units are dead for the whole batch, and Adam's square roots of the exact zeros of their kept
            # weights, which torch is slow at, would be counted as upkeep.
            masks = prune(self.net, "random", sparsity=0.9, allocation="uniform")
            rescale_(self.net, masks)
            Enforcer(self.net, masks, self.optimizer)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(self.batch[0]), self.batch[1]).backward()
        self.optimizer.step()


def time_upkeep(repeats: int) -> None:
    optimizers = (("SGD", False), ("Adam", False), ("Adam", True))
    for (optimizer, fused), batch_size in product(optimizers, (256, 1024)):
        candidates = {
            "dense": Training(optimizer, batch_size, masked=False, fused=fused),
            "masked, 90 %": Training(optimizer, batch_size, masked=True, fused=fused),
        }
        title = f"One training step with {optimizer}{' (fused)' * fused}, batch {batch_size}"
        report(title, interleaved(candidates, repeats, warmup=5), "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"## Pruning\n\n{machine()}")
    time_methods(args.repeats)
    time_synflow(max(1, args.repeats // 2))
    time_upkeep(30 * args.repeats)


if __name__ == "__main__":
    main()
