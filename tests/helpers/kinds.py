"""Kinds of LightningModules that users train, small, each with its data: the rows of the compatibility table."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.helpers.modules import Autoencoder, Classifier, Gan, cnn, digits, loader, mlp


def small_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def slow_sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-4)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


class Pictures(Classifier):
    """A classifier of digits as pictures of three channels."""

    def forward(self, x):
        return self.net(x.reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1))


def resnet18():
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


def vit():
    from torchvision.models import VisionTransformer

    net = VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)
    nn.init.normal_(net.heads.head.weight, std=0.1)  # zero by default: no loss gradient would reach the other layers
    return net


class Block(nn.Module):
    """Causal attention and an MLP, each behind a LayerNorm, as in GPT-2."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.norm2(x))))


class Gpt(pl.LightningModule):
    """A decoder whose output layer shares the embedding's weight; predicts the next token."""

    def __init__(self, vocabulary=11, width=16, tokens=6):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self):
        return adamw(self.parameters())


class WrappedGpt(Gpt):
    """The same inside one module, as networks from libraries are."""

    def __init__(self):
        super().__init__()
        inner = Gpt()
        self.tokens = self.positions = self.blocks = self.norm = self.head = None
        self.net = inner

    def forward(self, ids):
        return self.net(ids)


def tokens():
    ids = torch.randint(11, (48, 7), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(ids), batch_size=16)


class Rows(nn.Module):
    """Reads a digit row by row with an LSTM."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 12, num_layers=2, batch_first=True), nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.rnn(x.unflatten(1, (8, 8)))[0][:, -1])


class Dicts(Dataset):
    """Samples as dicts, with strings beside the tensors."""

    def __len__(self):
        return 48

    def __getitem__(self, i):
        x, y = digits()
        return {"image": x[i], "label": y[i], "name": f"digit {i}"}


class FromDict(Classifier):
    """Batches are dicts."""

    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self(batch["image"]), batch["label"]), "seen": len(batch["name"])}


class Lazy(Classifier):
    """Builds its layers in `configure_model`; one of them learns its width from the first batch."""

    def __init__(self):
        super().__init__(nn.Identity, adamw)

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            with torch.random.fork_rng():
                torch.manual_seed(6)
                self.net = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 10))
                self.net(torch.zeros(2, 64))


class Transfer(Classifier):
    """A frozen backbone in eval mode, only the head is trained."""

    def __init__(self):
        super().__init__(nn.Identity, small_sgd)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.backbone = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))
        self.backbone.requires_grad_(False)

    def on_train_start(self):
        self.backbone.eval()

    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)

    def configure_optimizers(self):
        return small_sgd(self.head.parameters())


class Talks(Classifier):
    """Logs in its training_step, and uses its trainer there."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y) * (1.0 + 0.0 * self.trainer.current_epoch)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log_dict({"step": float(self.trainer.global_step), "lr": self.optimizers().param_groups[0]["lr"]})
        self.trainer.logger.log_metrics({"by_hand": loss.item()}, step=self.trainer.global_step)
        return loss


class Checkpointed(nn.Module):
    """Activations of both blocks are computed again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(32, 24), nn.ReLU())
        self.head, self.reentrant = nn.Linear(24, 10), reentrant

    def forward(self, x):
        if self.reentrant:  # it recomputes only where an input needs a gradient
            x = x.detach().requires_grad_()
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@dataclass(frozen=True)
class Kind:
    """One row: a module, its data, and what the monitors can say of it.

    Attributes:
        build: The module; the same weights at every call.
        data: The train dataloader.
        refusal: Part of the sentence that says why no loss is predicted; None where one is.
        spectrum: Whether `GraphonMonitor` shows a kernel.
        pruner: Arguments of `PruneAtInit` that this kind needs.
    """

    build: Callable[[], pl.LightningModule]
    data: Callable[[], Any] = field(default=lambda: loader(48))
    refusal: str | None = None
    spectrum: bool = True
    pruner: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "mlp": Kind(lambda: Classifier(mlp, small_sgd)),
    "cnn with batch norm": Kind(lambda: Classifier(cnn, small_sgd)),
    # 11 million weights, batch norm that has seen no data: at 1e-2 the loss is a thousand times larger after one step.
    "resnet-18": Kind(lambda: Pictures(resnet18, slow_sgd), lambda: loader(12, batch_size=4)),
    "vit": Kind(lambda: Pictures(vit, adamw)),
    "gpt, tied": Kind(Gpt, tokens),
    "gpt, tied, one module": Kind(WrappedGpt, tokens),
    "lstm": Kind(lambda: Classifier(Rows, adamw), pruner={"include": "net.*weight*"}),
    "autoencoder": Kind(Autoencoder),
    "dict batches": Kind(lambda: FromDict(mlp, small_sgd), lambda: DataLoader(Dicts(), batch_size=16)),
    "gan": Kind(Gan, refusal="2 optimizers", spectrum=False),
    "configure_model": Kind(Lazy),
    "frozen backbone": Kind(Transfer),
    "logs, uses trainer": Kind(lambda: Talks(mlp, small_sgd)),
    "gradient checkpointing": Kind(lambda: Classifier(lambda: Checkpointed(False), small_sgd)),
    "reentrant checkpointing": Kind(lambda: Classifier(lambda: Checkpointed(True), small_sgd)),
}
