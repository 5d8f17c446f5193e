"""Runs under two processes (ModelParallelStrategy, gloo); every rank writes what it found to the folder given.

Not a test by itself: `test_fsdp.py` starts it and looks at what it wrote.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_graphon.callbacks import GraphonMonitor, PruneAtInit, SpectrumOptions
from lightning_graphon.callbacks import prune_at_init as pruner_module
from lightning_graphon.pruning import Enforcer, Masks, prune, summon_full_params
from lightning_graphon.pruning.sharding import full_tensor, is_sharded, local_shard, local_shard_like
from tests.distributed.ddp_script import OwnSeed, Unequal
from tests.helpers.leaving import write_and_leave
from tests.helpers.modules import Classifier, cnn, loader, make_trainer, quiet

GRAPHON = {"graphons": {"family": "power-law", "exponent": 0.5}}


def uneven():
    """No layer's rows divide by two, so that the shards have different sizes."""
    return nn.Sequential(nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 23), nn.ReLU(), nn.Linear(23, 11))


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


class Whole(Classifier):
    """In float64, so that sums in another order give the same masks (ModelParallelStrategy has no "64-true")."""

    def __init__(self, net=uneven, seed=1):
        super().__init__(lambda: net().double(), adam, seed)

    def forward(self, x):
        return self.net(x.double())


class Sharded(Whole):
    """Every layer of the network is cut over the processes, as users of FSDP2 do it."""

    def configure_model(self):
        if any(is_sharded(p) for p in self.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def two_layers():
    return nn.Sequential(nn.Linear(64, 34), nn.ReLU(), nn.Linear(34, 10))


class TensorParallel(Whole):
    """The first layer is cut by rows and the second by columns, and both ranks see the same data."""

    def configure_model(self):
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


class ShardProbe(Callback):
    """Largest pruned entry in this rank's own shards, wherever it could come back."""

    def __init__(self, pruner):
        self.pruner, self.worst, self.seen, self.dense = pruner, 0.0, 0, False

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.dense |= any(not is_sharded(p) for n, p in pl_module.net.named_parameters() if n.endswith("weight"))
        self._look(pl_module, lambda p: p.grad)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._look(pl_module, lambda p: p)
        for key in ("exp_avg", "exp_avg_sq"):
            self._look(pl_module, lambda p, key=key: trainer.optimizers[0].state[p][key])

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self._look(pl_module, lambda p: p)

    def _look(self, pl_module, tensor_of):
        named = dict(pl_module.named_parameters())
        for name, mask in self.pruner.masks.items():
            tensor = tensor_of(named[name])
            values = local_shard(tensor).detach()[~local_shard_like(mask, tensor)]
            self.seen += values.numel()
            self.worst = max(self.worst, values.abs().max().item() if values.numel() else 0.0)


class Garbage(Callback):
    """Somebody writes to pruned weights after the last step of an epoch, and saves them."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        with torch.no_grad():
            local_shard(dict(pl_module.named_parameters())["net.0.weight"]).add_(1.0)
        trainer.save_checkpoint(self.path)


def whole_weights(model):
    return {name: full_tensor(p.detach()).clone() for name, p in model.named_parameters()}


def fit(pruner, model, *others, ckpt_path=None, save=None, full=True, sizes=(2, 1), data=90, **kwargs):
    """Trains on two processes; what this rank saw. 90 samples: the last batch is smaller."""
    probe = ShardProbe(pruner)
    strategy = ModelParallelStrategy(*sizes, save_distributed_checkpoint=not full)
    settings = {"max_epochs": 2, "limit_train_batches": 1.0, **kwargs}
    trainer = make_trainer(OwnSeed(), Unequal(), pruner, probe, *others, strategy=strategy, devices=2, **settings)
    before = {}
    remember = Remember(before)
    trainer.callbacks.append(remember)
    trainer.fit(model, loader(data, batch_size=16), loader(32), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    sampler = trainer.train_dataloader.sampler
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(0)  # the order in which the first epoch, and the scoring, saw the data
    return {
        "masks": dict(pruner.masks),
        "worst": probe.worst,
        "seen": probe.seen,
        "dense": probe.dense,
        "same objects": before["ids"] == {name: id(p) for name, p in model.named_parameters()},
        "random": torch.rand(1).item(),
        "weights": whole_weights(model),
        "buffers": dict(model.named_buffers()),
        "indices": list(iter(sampler))[:32],
        "steps": trainer.global_step,
        "class": type(model.net[0]).__name__,
    }


class Remember(Callback):
    """The parameters that the optimizers were made for."""

    def __init__(self, into):
        self.into = into

    def setup(self, trainer, pl_module, stage):
        self.into.clear()

    def on_fit_start(self, trainer, pl_module):
        owned = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        self.into["ids"] = {name: id(p) for name, p in pl_module.named_parameters() if id(p) in owned}


def fit_watched(method, model, **kwargs):
    watch = GraphonMonitor(
        verbose=False, figure=False, raise_errors=True, spectrum=SpectrumOptions(probe_size=16, every_n_epochs=1)
    )
    keep = KeepInputs(watch)
    options = {"options": GRAPHON} if method == "graphon" else {}
    found = fit(quiet(method, batches=2, **options), model, watch, keep, **kwargs)
    found["graphons"] = {name: graphon.values for name, graphon in watch.graphons.items()}
    found["trace"] = watch.spectrum.trace if watch.spectrum else None
    return {**found, **keep.kept}


class KeepInputs(Callback):
    """What the kernel was evaluated on, before the monitor forgets it."""

    def __init__(self, watch):
        self.watch, self.kept = watch, {}

    def on_train_epoch_end(self, trainer, pl_module):
        spectra = self.watch._kernel
        if spectra._network is not None:
            self.kept = {"inputs": spectra._network.inputs, "source": spectra.source}


def never(*args, **kwargs):
    raise AssertionError("a resumed run scored its weights again")


def resume(folder):
    """Saved by two processes, whole and in shards, and resumed by two; and from a checkpoint of a single one."""
    found = {"unbroken": fit(quiet("snip", batches=2), Sharded(), max_epochs=4)}
    saved = {"whole": folder / "whole.ckpt", "shards": folder / "shards.ckpt"}
    for name, path in saved.items():
        found[f"first {name}"] = fit(quiet("snip", batches=2), Sharded(), save=path, full=name == "whole")
    compute, pruner_module.compute_masks = pruner_module.compute_masks, never
    for name, path in {**saved, "single": folder / "single.ckpt"}.items():
        found[f"resumed {name}"] = fit(quiet("snip", batches=2), Sharded(seed=9), max_epochs=4, ckpt_path=path)
    pruner_module.compute_masks = compute
    return found


def alone():
    """Without Lightning: prune, enforce and train; the last layer has one row, so that one process holds none of it."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    batch = (torch.randn(6, 5), torch.randn(6, 1))
    expected = prune(net, "snip", sparsity=0.5, batches=[batch], loss_fn=nn.functional.mse_loss)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (net[0], net):
        fully_shard(layer, mesh=mesh)
    try:
        prune(net, "magnitude", sparsity=0.5)
        said = ""
    except ValueError as error:
        said = str(error)
    net(batch[0])  # leaves the root with the whole weights of the last layer
    kind = type(net[0])
    with summon_full_params(net):
        masks = prune(net, "snip", sparsity=0.5, batches=[batch], loss_fn=nn.functional.mse_loss)
        inside = type(net[0]).__name__, [hook for m in net.modules() for hook in m._forward_pre_hooks]
    sharded = all(is_sharded(p) for p in net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    net(batch[0])
    with Enforcer(net, masks, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(batch[0]), batch[1]).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    weights = whole_weights(net)
    return {
        "said": said,
        "masks": dict(masks),
        "expected": dict(expected),
        "pruned": max(weights[name][~mask].abs().max().item() for name, mask in masks.items()),
        "inside": inside,
        "outside": sharded and type(net[0]) is kind and len(net[0]._forward_pre_hooks) == 1,
        "local rows": local_shard(net[2].weight).shape[0],
    }


class Start(Callback):
    """The whole weights that the first step starts from."""

    def on_train_start(self, trainer, pl_module):
        self.weights = whole_weights(pl_module)


def rescaled(model, **kwargs):
    pruner, start = quiet("magnitude", None, allocation="2:4", rescale="unit"), Start()
    return {**fit(pruner, model, start, **kwargs), "start": start.weights}


class Still(Sharded):
    """Zeros stay zeros without anybody's help."""

    def training_step(self, batch, batch_idx):
        return 0 * super().training_step(batch, batch_idx)


def watch_zeros(path):
    """The monitor without PruneAtInit reads the zeros of a network that was pruned before, from all shards."""
    model = Still()
    Masks.load(path).apply_(model)
    watch = GraphonMonitor(verbose=False, figure=False, include="Linear", raise_errors=True, spectrum=None)
    trainer = make_trainer(watch, strategy=ModelParallelStrategy(2, 1), devices=2, max_steps=1)
    trainer.fit(model, loader(90, batch_size=16))
    return {name: graphon.values for name, graphon in watch.graphons.items()}


class Pair(nn.Module):
    """Is called by a method of its own."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def encode(self, x):
        return self.second(self.first(x).tanh())


def wrapped():
    """Methods that FSDP has wrapped, its lower precision and a tied weight are gone while the model is gathered."""
    torch.manual_seed(3)
    net = Pair(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    net.second.weight = net.first.weight
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = net.encode(x).detach()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    register_fsdp_forward_method(net, "encode")
    with summon_full_params(net):
        found = net.encode(x).detach()
        tied = net.first.weight is net.second.weight
    low = net.encode(x).detach()
    return {"expected": expected, "found": found, "low": low, "tied": tied and net.first.weight is net.second.weight}


def main(folder):
    found = {m: fit_watched(m, Sharded()) for m in ("random", "magnitude", "snip", "grasp", "synflow", "graphon")}
    found["batch norm"] = fit_watched("snip", Sharded(cnn))
    found["tensor parallel"] = fit_watched("grasp", TensorParallel(two_layers), sizes=(1, 2))
    found["rescaled"] = rescaled(Sharded())
    found["rescaled, tensor parallel"] = rescaled(TensorParallel(two_layers), sizes=(1, 2))
    found["given"] = fit(PruneAtInit.from_masks(folder / "masks.pt", verbose=False), Sharded())
    for name, full in (("garbage", True), ("garbage in shards", False)):
        found[name] = fit(quiet("magnitude"), Sharded(), Garbage(folder / f"{name}.ckpt"), full=full)
    found["monitor alone"] = watch_zeros(folder / "masks.pt")
    found["wrapped"] = wrapped()
    found["resume"] = resume(folder)
    found["alone"] = alone()
    write_and_leave(found, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
