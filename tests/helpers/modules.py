"""Small LightningModules, data and trainers that the callbacks' tests share."""

from functools import cache

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

DATA_METHODS = ["snip", "grasp", "synflow"]
METHODS = ["random", "magnitude", *DATA_METHODS]
PUBLISHED = ["px", "synflow-l2", "ntk-sap", "force", "prospr", "ramanujan"]
needs_fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch does not run on a CPU"
)


@cache
def digits(n=96):
    """The first scikit-learn digits in [0, 1] and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data[:n] / 16, dtype=torch.float32), torch.tensor(data.target[:n])


def loader(n=96, batch_size=16, **kwargs):
    return DataLoader(TensorDataset(*digits(n)), batch_size=batch_size, **kwargs)


def mlp():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),
    )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


class UserNetwork(nn.Module):
    """A network in a class of its own: torch 2.6 leaves those of torch.nn as they are in `compile()`."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)


class Classifier(pl.LightningModule):
    """A plain classifier; the same initial weights whenever it is built with the same seed."""

    def __init__(self, net=mlp, optimizer=sgd, seed=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = net()
        self.make_optimizer = optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Gan(pl.LightningModule):
    """Two networks, two optimizers, optimised by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())
            self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        real = batch[0]
        g_opt, d_opt = self.optimizers()
        noise = torch.randn(len(real), 8, device=self.device)

        self.toggle_optimizer(g_opt)
        judged = self.discriminator(self.generator(noise))
        g_loss = F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
        g_opt.zero_grad()
        self.manual_backward(g_loss)
        self.clip_gradients(g_opt, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        g_opt.step()
        self.untoggle_optimizer(g_opt)

        self.toggle_optimizer(d_opt)
        true, fake = self.discriminator(real), self.discriminator(self.generator(noise).detach())
        d_loss = F.binary_cross_entropy_with_logits(true, torch.ones_like(true))
        d_loss = d_loss + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        d_opt.zero_grad()
        self.manual_backward(d_loss)
        d_opt.step()
        self.untoggle_optimizer(d_opt)
        self.log_dict({"g": g_loss, "d": d_loss})

    def configure_optimizers(self):
        g = torch.optim.Adam(self.generator.parameters(), lr=1e-2, betas=(0.5, 0.999), weight_decay=1e-3)
        d = torch.optim.SGD(self.discriminator.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3)
        return [g, d]


class Autoencoder(pl.LightningModule):
    """Encoder and decoder called one after the other; the batch is only the image."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
            self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))

    def training_step(self, batch):
        x = batch[0]
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Probe(Callback):
    """Looks at the pruned weights wherever they could come back, after every step and before every validation."""

    def __init__(self, pruner):
        self.pruner = pruner
        self.worst = {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}
        self.seen = dict.fromkeys(self.worst, 0)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = dict(pl_module.named_parameters())
        for name, mask in self.pruner.masks.items():
            if named[name].grad is not None:
                self._note("gradient", named[name].grad[~mask])
        self._look("step", pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._look("batch", pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._look("step", pl_module)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._look("validation", pl_module)

    def _look(self, key, pl_module):
        named = dict(pl_module.named_parameters())
        for name, mask in self.pruner.masks.items():
            self._note(key, named[name].detach()[~mask])

    def _note(self, key, values):
        self.seen[key] += 1
        if values.numel():
            self.worst[key] = max(self.worst[key], values.abs().max().item())


class Recorder(Callback):
    """Keeps the first training batches and the losses."""

    def __init__(self):
        self.batches, self.losses = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(
            torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, batch)
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def make_trainer(*callbacks, **kwargs):
    """A quiet Trainer of one epoch of three batches on the CPU."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "limit_train_batches": 3,
        "limit_val_batches": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def quiet(method, sparsity=0.9, **kwargs):
    """A PruneAtInit that prints nothing; SynFlow in ten rounds."""
    from lightning_graphon.callbacks import PruneAtInit

    rounds = {"steps": 10} if method == "synflow" else {}
    return PruneAtInit(method, sparsity, **{"verbose": False, **rounds, **kwargs})


def pruned_max(module, masks):
    """Largest absolute pruned weight."""
    named = dict(module.named_parameters())
    return max((named[name].detach()[~mask].abs().max().item() for name, mask in masks.items() if (~mask).any()))


def disagreement(masks, others):
    """Fraction of entries in which two sets of masks differ."""
    assert list(masks) == list(others)
    return sum(int((masks[n].cpu() != others[n].cpu()).sum()) for n in masks) / sum(m.numel() for m in masks.values())


def snapshot(module):
    """Every weight, buffer, gradient and flag of a module, copied."""
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "ids": {name: id(p) for name, p in module.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "training": {name: m.training for name, m in module.named_modules()},
    }
