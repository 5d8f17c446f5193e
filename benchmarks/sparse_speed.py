"""Time and memory of sparse networks: dense with zeros, compact, and compact with CSR weights where they are faster.

64-W-W-W-10 with ReLU on the digits, pruned at initialisation and trained for one pass. One row for each width, method
and sparsity, printed and appended to --output as it comes; rows that are there are not run again.
`python benchmarks/sparse_speed.py --widths 512 2048 --output rows.csv`
"""

import argparse
import csv
from itertools import pairwise
from pathlib import Path

import torch
from _timing import interleaved, machine
from sklearn.datasets import load_digits
from torch import nn

from lightning_graphon.compact import compact, to_sparse
from lightning_graphon.pruning import prune

COLUMNS = ("width", "method", "sparsity", "batch", "macs_share", "dense_ms", "compact_ms", "csr_ms", "sparse_ms",
           "compact_time_share", "over_macs", "dense_kb", "compact_kb", "sparse_kb", "csr_layers", "error")  # fmt: skip
REPEATS = {1: 200, 64: 40, 1024: 8}


def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def network(width, seed=0):
    torch.manual_seed(seed)
    sizes = [64, width, width, width, 10]
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@torch.enable_grad()
def trained(width, method, sparsity):
    """A sparse network after one pass over the digits with Adam, and its masks."""
    model, (x, y) = network(width), digits()
    masks = prune(model, method, sparsity=sparsity, batches=[(x[:256], y[:256])])
    optimizer, parameters = torch.optim.Adam(model.parameters(), lr=1e-3), dict(model.named_parameters())
    for batch, target in zip(x.split(64), y.split(64), strict=True):
        masks.apply_(model)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        for name, mask in masks.items():
            parameters[name].grad.mul_(mask)
        optimizer.step()
    masks.apply_(model)
    return model.eval(), masks


def kilobytes(model):
    """Of weights and biases; of CSR its three tensors."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        parts = [tensor]
        if tensor.layout == torch.sparse_csr:
            parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        total += sum(part.numel() * part.element_size() for part in parts)
    return round(total / 1024)


@torch.no_grad()
def rows(width, method, sparsity, batches):
    model, masks = trained(width, method, sparsity)
    for batch in batches:
        x = digits()[0].repeat(-(-batch // 1797), 1)[:batch].contiguous()
        small = compact(model, masks, x)
        csr, sparse = to_sparse(small.model, None, x, layout="csr").model, to_sparse(small.model, None, x)
        runs = {"dense": model, "compact": small.model, "csr": csr, "sparse": sparse.model}
        seconds = interleaved({k: lambda net=net, x=x: net(x) for k, net in runs.items()}, REPEATS[batch], 2)
        least = {name: 1e3 * min(found) for name, found in seconds.items()}
        share = small.report.macs.share
        yield {
            "width": width, "method": method, "sparsity": sparsity, "batch": batch, "macs_share": round(share, 4),
            **{f"{name}_ms": round(value, 4) for name, value in least.items()},
            "compact_time_share": round(least["compact"] / least["dense"], 4),
            "over_macs": round(least["compact"] / least["dense"] / share, 3),
            "dense_kb": kilobytes(model), "compact_kb": kilobytes(small.model), "sparse_kb": kilobytes(sparse.model),
            "csr_layers": sum(choice.layout == "csr" for choice in sparse.layers.values()),
            "error": f"{small.report.error:.1e}",
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--methods", nargs="+", default=["random", "snip", "synflow"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--output", type=Path, default=Path("runs/sparse_speed.csv"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if options.output.exists():
        with options.output.open() as file:
            done = {(int(r["width"]), r["method"], float(r["sparsity"])) for r in csv.DictReader(file)}
    print(machine(), ",".join(COLUMNS), sep="\n", flush=True)
    for width in options.widths:
        for method in options.methods:
            for sparsity in options.sparsities:
                if (width, method, sparsity) in done:
                    continue
                found = list(rows(width, method, sparsity, options.batches))
                new = not options.output.exists()
                with options.output.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if new:
                        writer.writeheader()
                    writer.writerows(found)
                for row in found:
                    print(",".join(str(row[c]) for c in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
