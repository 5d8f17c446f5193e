"""Runs under two processes (DDP and FSDP2); every rank writes what it found to the folder given.

Not a test by itself: `test_growth.py` starts it and looks at what it wrote.
"""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DistributedSampler

from lightning_graphon.callbacks import DynamicSparsity
from lightning_graphon.pruning.sharding import full_tensor, is_sharded, local_shard, local_shard_like
from tests.distributed.ddp_script import OwnSeed, Unequal
from tests.distributed.fsdp_script import Sharded, Whole, uneven
from tests.helpers.leaving import write_and_leave
from tests.helpers.modules import digits, loader, make_trainer, needs_fsdp2

METHODS = ["set", "rigl", "snfs", "srigl", "gmp", "redistributed"]


def moving(method):
    moves = {"redistribute": True} if method == "redistributed" else {}
    name = "rigl" if method == "redistributed" else method
    return DynamicSparsity(name, 0.8, every_n_steps=2, fraction=0.5, verbose=False, **moves)


class Watch(Callback):
    """The masks after every step, and the largest pruned weight or gradient in this rank's own part."""

    def __init__(self, pruner):
        self.pruner, self.masks, self.worst, self.sharded = pruner, [], 0.0, False

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.look(pl_module, lambda p: p.grad)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(pl_module, lambda p: p)
        self.masks.append({name: mask.clone() for name, mask in self.pruner.masks.items()})

    def look(self, pl_module, tensor_of):
        named = dict(pl_module.named_parameters())
        for name, mask in self.pruner.masks.items():
            tensor = tensor_of(named[name])
            self.sharded |= is_sharded(tensor)
            pruned = local_shard(tensor).detach()[~local_shard_like(mask, tensor)]
            self.worst = max(self.worst, pruned.abs().max().item() if pruned.numel() else 0.0)


def fit(method, model, strategy, **kwargs):
    pruner = moving(method)
    watch = Watch(pruner)
    trainer = make_trainer(
        OwnSeed(), Unequal(), pruner, watch, strategy=strategy, devices=2, max_epochs=4, limit_val_batches=0,
        limit_train_batches=3, use_distributed_sampler=False, **kwargs,
    )  # fmt: skip
    # Dealt in turn: batch k of both ranks is samples 32 k to 32 k + 31.
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler = DistributedSampler(range(len(digits()[0])), num_replicas=2, rank=rank, shuffle=False)
    trainer.fit(model, loader(batch_size=16, sampler=sampler))
    return {
        "masks": watch.masks,
        "worst": watch.worst,
        "sharded": watch.sharded,
        "random": torch.rand(1).item(),
        "weights": {name: full_tensor(p.detach()).clone() for name, p in model.named_parameters()},
    }, trainer


def main(folder):
    found = {}
    for method in METHODS:
        found[f"ddp {method}"], _ = fit(method, Whole(), "ddp")
    found["ddp accumulated"], _ = fit("rigl", Whole(), "ddp", accumulate_grad_batches=3)
    if not needs_fsdp2.args[0]:
        for method in METHODS:
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            found[f"fsdp {method}"], _ = fit(method, Sharded(uneven), strategy)
    write_and_leave(found, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
