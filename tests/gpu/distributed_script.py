"""One process of a run on one card; writes what it found to the folder given. `test_distributed.py` starts it."""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_graphon.callbacks import GraphonMonitor, KernelPrediction, LossDecayMonitor, SpectrumOptions
from lightning_graphon.pruning.sharding import full_tensor
from tests.helpers.leaving import leave
from tests.helpers.modules import Classifier, loader, make_trainer, quiet


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


class Sharded(Classifier):
    """Every layer cut over the processes by FSDP2."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def fit(method, backend, wrapper, world, device):
    pruner = quiet(method, batches=2)
    graphons = GraphonMonitor(verbose=False, figure=False, raise_errors=True, spectrum=SpectrumOptions(probe_size=16))
    losses = LossDecayMonitor(
        probe_size=8,
        every_n_steps=1,
        figure=False,
        verbose=False,
        raise_errors=True,
        kernel=KernelPrediction(start_step=1),
    )
    if wrapper == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, process_group_backend=backend
        )
    else:
        strategy = DDPStrategy(process_group_backend=backend)
    module = (Sharded if wrapper == "fsdp2" else Classifier)(optimizer=adamw)
    # Each process is a node with one device of its own, which is the same card.
    trainer = make_trainer(
        pruner, graphons, losses, strategy=strategy, accelerator="gpu" if device == "cuda" else "cpu", num_nodes=world,
        max_epochs=2,
    )  # fmt: skip
    trainer.fit(module, loader(batch_size=16))
    weights = {name: full_tensor(p.detach()).cpu() for name, p in module.named_parameters()}
    return {
        "masks": {name: mask.cpu() for name, mask in pruner.masks.items()},
        "weights": weights,
        "worst": max(float(weights[name][~mask.cpu()].abs().max()) for name, mask in pruner.masks.items()),
        "trace": graphons.spectrum.trace if graphons.spectrum else None,
        "observed": losses.curves["observed"],
    }


def main(folder, backend, wrapper, world, device):
    warnings.simplefilter("ignore")
    methods = ("random", "snip", "synflow")
    found = {method: fit(method, backend, wrapper, int(world), device) for method in methods}
    torch.save(found, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
