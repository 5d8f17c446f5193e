"""Pruning a decoder of 110 million parameters, and the graphons of its layers: seconds, and memory beside the model."""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _timing import machine
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.graphon import homogeneity_test, layer_graphons
from lightning_graphon.pruning import Masks, prune

LAYERS, WIDTH, HEADS, VOCABULARY, TOKENS = 12, 768, 12, 32_000, 128


class Block(nn.Module):
    """Causal attention and an MLP, each behind a LayerNorm, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.norm2(x))))


class Decoder(nn.Module):
    """Token and position embeddings, twelve blocks, an output layer tied to the token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def pruned(method: str, sequences: int, **options: Any) -> Callable[[Decoder], str]:
    """A task: `prune` on one batch of `sequences` times 128 tokens."""

    def run(model: Decoder) -> str:
        ids = torch.randint(VOCABULARY, (sequences, TOKENS + 1), generator=torch.Generator().manual_seed(0))
        batch = (ids[:, :-1], ids[:, 1:])
        masks = prune(model, method, sparsity=0.9, batches=[batch], loss_fn=token_loss, **options)
        return f"{masks.kept:,} of {masks.total:,} weights kept"

    return run


def random_masks(model: Decoder) -> Masks:
    return prune(model, "random", sparsity=0.9)


def estimated(masks: Masks) -> str:
    return f"{len(layer_graphons(masks, bins=64))} layers, 64 x 64 cells each"


def tested(masks: Masks) -> str:
    tests = [homogeneity_test(mask) for mask in masks.values() if mask.numel() <= 1 << 24]
    return f"{sum(t.verdict == 'homogeneous' for t in tests)} of {len(tests)} layers homogeneous"


TASKS: dict[str, tuple[Callable[[Decoder], Any], Callable[[Any], str]]] = {
    "random": (lambda model: model, pruned("random", 1)),
    "magnitude": (lambda model: model, pruned("magnitude", 1)),
    "SNIP, batch of 2 x 128 tokens": (lambda model: model, pruned("snip", 2)),
    "SynFlow, 10 rounds, float64": (lambda model: model, pruned("synflow", 1, steps=10)),
    "SynFlow, 10 rounds, float32": (lambda model: model, pruned("synflow", 1, steps=10, options={"double": False})),
    "SynFlow, 100 rounds, float32": (lambda model: model, pruned("synflow", 1, options={"double": False})),
    "graphons of all layers": (random_masks, estimated),
    "homogeneity tests of all layers but the embedding": (random_masks, tested),
}


def resident() -> float:
    """Resident memory now, GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def peak() -> float:
    """Highest resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(name: str) -> None:
    """One row of the table, in a process of its own so that peaks do not mix."""
    prepare, work = TASKS[name]
    torch.manual_seed(0)
    model = Decoder()
    given = prepare(model)
    before = resident()
    raised = peak() - before  # by building and preparing; a smaller peak of the work itself would not be seen
    start = time.perf_counter()
    found = work(given)
    seconds, grown = time.perf_counter() - start, peak() - before
    beside = f"{grown:.2f}" if grown > raised + 0.01 else f"below {raised + 0.01:.2f}"
    print(f"| {name} | {seconds:.1f} | {beside} | {found} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(TASKS), nargs="*", default=list(TASKS))
    args = parser.parse_args()
    parameters = sum(p.numel() for p in Decoder().parameters())
    print(f"## A large model\n\n{machine()}\n\n{parameters:,} parameters, {4 * parameters / 1e9:.2f} GB in float32\n")
    print("| | seconds | peak memory beside the model (GB) | |\n|---|---|---|---|", flush=True)
    context = multiprocessing.get_context("spawn")
    for name in args.only:
        process = context.Process(target=measure, args=(name,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name}: the process ended with {process.exitcode}")


if __name__ == "__main__":
    main()
