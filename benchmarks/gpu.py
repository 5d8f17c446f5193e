"""What pruning, masks, kernels and monitors cost on a GPU: one table in markdown, in less than five minutes.

    python benchmarks/gpu.py                 # on a CUDA device
    python benchmarks/gpu.py --device cpu    # tries itself on small networks

Each part that fails says so and leaves the others alone. Seconds are medians unless said, with the device waited for.
"""

import argparse
import logging
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from _timing import machine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit
from lightning_graphon.graphon import StepGraphon
from lightning_graphon.ntk import empirical_ntk, graphon_ntk
from lightning_graphon.pruning import Enforcer, prune


class Sizes:
    """Widths and counts: those that are reported, or small ones to try the script."""

    def __init__(self, full: bool) -> None:
        self.full = full
        self.width, self.repeats = (1024, 5) if full else (32, 2)
        self.samples, self.pairs = (2048, 4096) if full else (24, 48)
        self.decoder = (19, 2048, 16, 32_000) if full else (2, 32, 2, 50)
        self.steps, self.batch = (400, 256) if full else (12, 8)


def mlp(width: int) -> nn.Sequential:
    sides = (784, *[width] * 4, 10)
    layers = [layer for a, b in pairwise(sides) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """Causal attention and an MLP, each behind a LayerNorm, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.norm2(x))))


class Decoder(nn.Module):
    """A language model whose output layer is tied to the embedding."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(128, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def waited(device: torch.device) -> float:
    """The clock, when the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device, repeats: int, warm: bool = True) -> list[float]:
    found = []
    if warm:
        work()
    for _ in range(repeats):
        start = waited(device)
        work()
        found.append(waited(device) - start)
    return found


def peak(device: torch.device) -> float:
    """Highest memory of tensors since the last reset, GB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def reset(device: torch.device) -> float:
    """Bytes allocated now, GB; peaks are counted from here on."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 1e9


def networks(sizes: Sizes) -> dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[..., Tensor]]]:
    """Network, inputs and loss."""
    from torchvision.models import resnet18, resnet50, vit_b_16

    pictures = (64, 3, 224, 224) if sizes.full else (2, 3, 32, 32)

    def vit() -> nn.Module:
        net = vit_b_16()
        nn.init.normal_(net.heads.head.weight, std=0.02)  # zeros by default: no gradient reaches the other layers
        return net

    chosen = {"ResNet-50": resnet50, "ViT-B/16": vit} if sizes.full else {"ResNet-18": resnet18}
    found: dict[str, Any] = {
        f"MLP 784-{sizes.width}x4-10": (lambda: mlp(sizes.width), lambda: torch.randn(256, 784), F.cross_entropy)
    }
    for name, build in chosen.items():
        found[name] = (build, lambda: torch.randn(pictures), F.cross_entropy)
    layers, width, heads, vocabulary = sizes.decoder
    tokens = partial(torch.randint, vocabulary, (4, 128))
    found["decoder"] = (lambda: Decoder(layers, width, heads, vocabulary), tokens, token_loss)
    return found


def time_pruning(device: torch.device, sizes: Sizes) -> None:
    print("\n### One call of `prune` at 90 %, one batch; SynFlow in 100 rounds\n")
    print("| network | parameters (million) | method | seconds | peak beside the network (GB) |\n|---|---|---|---|---|")
    for name, (build, data, loss) in networks(sizes).items():
        torch.manual_seed(0)
        model, x = build().to(device), data().to(device)
        count = sum(p.numel() for p in model.parameters())
        classes = x if name == "decoder" else torch.arange(len(x), device=device) % 10
        slow = count > 5e6  # no second try, no warm-up
        rounds = 10 if count > 5e8 else 100
        for method in ("snip", "grasp", "synflow", "synflow, float32"):
            options: dict[str, Any] = {"steps": rounds} if "synflow" in method else {}
            options["options"] = {"double": False} if "float32" in method else {}
            work = partial(
                prune, model, method.split(",")[0], sparsity=0.9, batches=[(x, classes)], loss_fn=loss, **options
            )
            before = reset(device)
            try:
                found = seconds(work, device, 1 if slow else sizes.repeats, warm=not slow)
                row = f"{statistics.median(found):.3f} | {peak(device) - before:.2f}"
            except torch.OutOfMemoryError:
                row = "out of memory | "
            except ValueError as error:
                row = f"{error} | "
            if rounds != 100 and "synflow" in method:
                method = f"{method}, {rounds} rounds"
            print(f"| {name} | {count / 1e6:.1f} | {method} | {row} |", flush=True)
        del model, x


def time_upkeep(device: torch.device, sizes: Sizes) -> None:
    print("\n### Keeping weights pruned: one training step, 90 %, against the same network dense (interleaved)\n")
    print("| network, batch | optimizer | dense (ms) | masked (ms) | ratio |\n|---|---|---|---|---|")
    clip = partial(nn.utils.clip_grad_norm_, max_norm=1.0)
    ways: dict[str, tuple[Callable[..., torch.optim.Optimizer], bool]] = {
        "SGD": (partial(torch.optim.SGD, lr=1e-9, momentum=0.9), False),
        "Adam": (partial(torch.optim.Adam, lr=1e-9), False),
        "AdamW fused": (partial(torch.optim.AdamW, lr=1e-9, fused=device.type == "cuda"), False),
        "AdamW fused, clipped": (partial(torch.optim.AdamW, lr=1e-9, fused=device.type == "cuda"), True),
    }
    for batch, (way, (make, clipped)) in ((b, w) for b in (256, 1024) for w in ways.items()):
        steps = {}
        for masked in (False, True):
            torch.manual_seed(0)
            net, x = mlp(sizes.width).to(device), torch.randn(batch, 784, device=device)
            y, optimizer = torch.arange(batch, device=device) % 10, make(net.parameters())
            if masked:
                Enforcer(net, prune(net, "random", sparsity=0.9), optimizer)

            def step(
                net: nn.Module = net, x: Tensor = x, y: Tensor = y, optimizer: torch.optim.Optimizer = optimizer,
                clipped: bool = clipped,
            ) -> None:  # fmt: skip
                for _ in range(20):
                    optimizer.zero_grad()
                    F.cross_entropy(net(x), y).backward()
                    if clipped:
                        clip(net.parameters())
                    optimizer.step()

            steps[masked] = step
        rounds = [[seconds(steps[masked], device, 1)[0] / 20 for masked in (False, True)] for _ in range(sizes.repeats)]
        dense, pruned = (1e3 * statistics.median(row[i] for row in rounds) for i in (0, 1))
        ratio = statistics.median(b / a for a, b in rounds)
        print(f"| MLP, {batch} | {way} | {dense:.3f} | {pruned:.3f} | {ratio:.3f} |", flush=True)


def time_infinite(device: torch.device, sizes: Sizes) -> None:
    print(f"\n### Infinite-width kernel, ReLU, 4 hidden layers, {sizes.pairs} samples of 784 inputs\n")
    print("| positions a layer | dtype | seconds | peak beside the inputs (GB) |\n|---|---|---|---|")
    source = torch.Generator().manual_seed(0)
    for positions in (1, 8, 64) if sizes.full else (1, 8):
        for dtype in (torch.float64, torch.float32):
            shapes = [(positions, 784), *[(positions, positions)] * 3, (1, positions)]
            if positions == 1:
                shapes[0] = (1, 1)
            graphons = [StepGraphon(torch.rand(shape, generator=source).to(device, dtype)) for shape in shapes]
            x = torch.randn(sizes.pairs, 784, device=device, dtype=dtype)
            before = reset(device)
            found = seconds(partial(graphon_ntk, x, graphons), device, sizes.repeats)
            shown = str(dtype).removeprefix("torch.")
            row = f"{statistics.median(found):.3f} | {peak(device) - before:.2f}"
            print(f"| {positions} | {shown} | {row} |", flush=True)


def by_torch_func(net: nn.Module, masks: dict[str, Tensor], x: Tensor, edge: int) -> Tensor:
    """The torch.func tutorial's kernel (`vmap(jacrev)`, masks multiplied in), tile by tile so that it fits."""
    values = {name: p.detach() for name, p in net.named_parameters()}

    def one(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        masked = {n: v * masks[n] if n in masks else v for n, v in values.items()}
        return torch.func.functional_call(net, masked, (sample[None],))[0]

    jacobian = torch.func.vmap(torch.func.jacrev(one), (None, 0))
    out = x.new_zeros(len(x), len(x))
    for i in range(0, len(x), edge):
        left = {n: j.flatten(2) for n, j in jacobian(values, x[i : i + edge]).items()}
        for k in range(0, i + 1, edge):
            right = left if i == k else {n: j.flatten(2) for n, j in jacobian(values, x[k : k + edge]).items()}
            tile = sum(torch.einsum("Naf,Maf->NM", left[n], right[n]) for n in left) / left[next(iter(left))].shape[1]
            out[i : i + edge, k : k + edge], out[k : k + edge, i : i + edge] = tile, tile.T
            del right
    return out


def time_exact(device: torch.device, sizes: Sizes) -> None:
    print("\n### Exact kernel of the masked MLP, float32, 90 %\n")
    print("| | samples | seconds | peak beside network and samples (GB) | largest difference |\n|---|---|---|---|---|")
    torch.manual_seed(0)
    net = mlp(sizes.width).to(device)
    masks = dict(prune(net, "random", sparsity=0.9))
    few, edge = (128, 64) if sizes.full else (8, 4)
    kernels = {}
    for samples in (few, sizes.samples):
        x = torch.randn(samples, 784, device=device)
        ways: dict[str, Callable[[], Tensor]] = {"this library": partial(empirical_ntk, net, x, masks=masks)}
        if samples == few:
            ways[f"torch.func, {edge} samples at a time"] = partial(by_torch_func, net, masks, x, edge)
        for way, work in ways.items():
            before = reset(device)
            found = seconds(work, device, sizes.repeats)
            kernels[way] = work()
            apart = float((kernels[way] - kernels["this library"]).abs().max() / kernels[way].abs().max())
            row = f"{statistics.median(found):.4f} | {peak(device) - before:.2f} | {apart:.1e}"
            print(f"| {way} | {samples} | {row} |", flush=True)
    tiles = (sizes.samples / few) ** 2
    print(
        f"\ntorch.func's arithmetic grows with the square of the samples: {tiles:.0f} times as much at {sizes.samples}."
    )


class Module(pl.LightningModule):
    """A classifier."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def time_monitors(device: torch.device, sizes: Sizes) -> None:
    print(f"\n### A fit of {sizes.steps} steps with SNIP at 90 %, monitors at their defaults (interleaved)\n")
    print("| network | callbacks | fit (s) | ratio to PruneAtInit alone |\n|---|---|---|---|")
    from torchvision.models import resnet18

    count = sizes.batch * (sizes.steps if sizes.full else 4)
    shapes: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "MLP": (lambda: mlp(sizes.width), (784,)),
        "ResNet-18, 32 x 32": (lambda: resnet18(num_classes=10), (3, 32, 32)),
    }
    monitors: dict[str, list[Callable[[], pl.Callback]]] = {
        "PruneAtInit": [],
        "GraphonMonitor": [partial(GraphonMonitor, verbose=False)],
        "LossDecayMonitor": [partial(LossDecayMonitor, verbose=False)],
        "both": [partial(GraphonMonitor, verbose=False), partial(LossDecayMonitor, verbose=False)],
    }
    for name, (build, shape) in shapes.items():
        data = TensorDataset(torch.randn(min(count, 8192), *shape), torch.arange(min(count, 8192)) % 10)
        taken: dict[str, list[float]] = {which: [] for which in monitors}
        for repeat in range(2):
            for which, more in monitors.items():
                torch.manual_seed(0)
                trainer = pl.Trainer(
                    callbacks=[PruneAtInit("snip", 0.9, verbose=False), *(make() for make in more)], logger=False,
                    accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_steps=sizes.steps,
                    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                    default_root_dir="build/gpu",
                )  # fmt: skip
                start = waited(device)
                trainer.fit(Module(build()), DataLoader(data, sizes.batch, shuffle=True))
                if repeat:  # the first loads what is loaded once
                    taken[which].append(waited(device) - start)
        for which, found in taken.items():
            ratio = statistics.median(a / b for a, b in zip(found, taken["PruneAtInit"], strict=True))
            print(f"| {name} | {which} | {statistics.median(found):.2f} | {ratio:.3f} |", flush=True)


PARTS = {
    "pruning": time_pruning,
    "upkeep": time_upkeep,
    "infinite": time_infinite,
    "exact": time_exact,
    "monitors": time_monitors,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="'cpu' tries the script itself on small networks")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    device = torch.device(args.device)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"## On a GPU\n\n{machine()}")
    failed = []
    for name in args.only:
        start = time.perf_counter()
        try:
            PARTS[name](device, Sizes(full=device.type == "cuda"))
        except Exception:
            failed.append(name)
            print(f"\n{name} failed:\n\n```\n{traceback.format_exc()}```")
        print(f"\n({name}: {time.perf_counter() - start:.0f} s)", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
