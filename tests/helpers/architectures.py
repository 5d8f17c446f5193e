"""Networks that users bring, tiny and at random weights: the rows of `docs/how-to/any-model.md`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.modules import Autoencoder, Gan, loader

BATCH, BATCHES = 4, 12  # steps: the prediction for Adam begins at step 10


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


class Module(pl.LightningModule):
    """A network and its optimizer; the loss is what the network returns for a batch."""

    def __init__(self, net: Callable[[], nn.Module], optimizer: Callable[..., torch.optim.Optimizer] = adamw) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = net()
        self.make_optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class Supervised(Module):
    """Cross-entropy of classes, of one per image or one per pixel."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class LossInside(Module):
    """As of transformers: given labels the network computes its own loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        return loss


def gpt2(**size: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))


def bert(**size: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(**size))


def vit(name: str = "vit_base_patch16_224", **size: int) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, **size)


def resnet(**size: Any) -> nn.Module:
    models = pytest.importorskip("timm.models.resnet")
    return models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=10, **size)


class UNet(nn.Module):
    """Two levels with a skip connection; a class per pixel."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.down, self.bottom = self._block(3, width), self._block(width, 2 * width)
        self.up, self.join = nn.ConvTranspose2d(2 * width, width, 2, stride=2), self._block(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        joined: Tensor = self.head(self.join(torch.cat([skip, self.up(self.bottom(F.max_pool2d(skip, 2)))], 1)))
        return joined

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def faster_rcnn() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    ops = pytest.importorskip("torchvision.ops")
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
    backbone.out_channels = 8
    return detection.FasterRCNN(
        backbone,
        min_size=32,
        max_size=32,
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(((16,),), ((1.0,),)),
        box_roi_pool=ops.MultiScaleRoIAlign(["0"], 2, 0),
        box_head=detection.faster_rcnn.TwoMLPHead(8 * 4, 16),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, 3),
    )


class Detector(Module):
    """A dict of losses in train mode, boxes in eval mode."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack(list(self.net(*batch).values())).sum()


class GraphNetwork(nn.Module):
    """Two convolutions over a graph, a mean over its nodes."""

    def __init__(self) -> None:
        super().__init__()
        geometric = pytest.importorskip("torch_geometric.nn")
        self.first, self.second = geometric.GCNConv(4, 16), geometric.GCNConv(16, 16)
        self.pool, self.head = geometric.global_mean_pool, nn.Linear(16, 3)

    def forward(self, graphs: Any) -> Tensor:
        hidden = self.second(self.first(graphs.x, graphs.edge_index).relu(), graphs.edge_index)
        logits: Tensor = self.head(self.pool(hidden, graphs.batch))
        return logits


class GraphClassifier(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch), batch.y)


class DenseGraphs(Module):
    """The same with a row per graph in every tensor of the batch, so that samples can be told apart."""

    def __init__(self) -> None:
        convolution = pytest.importorskip("torch_geometric.nn").DenseGCNConv
        super().__init__(lambda: nn.ModuleList([convolution(4, 16), convolution(16, 16), nn.Linear(16, 3)]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        first, second, head = self.net
        hidden = first(batch["x"], batch["adjacency"], batch["mask"]).relu()
        hidden = second(hidden, batch["adjacency"], batch["mask"])
        return F.cross_entropy(head(hidden.sum(1) / batch["mask"].sum(1, keepdim=True)), batch["y"])


class Pinn(Module):
    """Solves u″ = −sin x with u = 0 on the boundary: the loss differentiates the network by its inputs."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].requires_grad_()
        first = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        boundary = self.net(torch.tensor([[0.0], [torch.pi]]))
        return (second + x.sin()).square().mean() + boundary.square().mean()


class GatedResidual(nn.Module):
    """The block that a temporal fusion transformer is made of."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.hidden, self.gate = nn.Linear(inputs, outputs), nn.Linear(outputs, 2 * outputs)
        self.skip, self.norm = nn.Linear(inputs, outputs), nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.skip(x) + F.glu(self.gate(F.elu(self.hidden(x))), -1))
        return normed


class TemporalFusion(nn.Module):
    """Variable selection, an LSTM, attention over time, three quantiles of each future step."""

    def __init__(self, variables: int = 4, width: int = 8, future: int = 3) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(1, width) for _ in range(variables))
        self.series = nn.Embedding(5, width)
        self.select = GatedResidual(variables * width, variables)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.grow, self.head, self.future = GatedResidual(width, width), nn.Linear(width, 3), future

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        embedded = torch.stack([e(x[..., None]) for e, x in zip(self.embed, batch["x"].unbind(-1), strict=True)], -2)
        weights = self.select(embedded.flatten(-2)).softmax(-1)
        hidden = self.rnn((weights[..., None] * embedded).sum(-2) + self.series(batch["series"])[:, None])[0]
        attended = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        quantiles: Tensor = self.head(self.grow(hidden + attended)[:, -self.future :])
        return quantiles


class Forecaster(Module):
    """Quantile loss."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        error = batch["target"][..., None] - self.net(batch)
        levels = torch.tensor([0.1, 0.5, 0.9])
        return torch.maximum(levels * error, (levels - 1) * error).mean()


def _rows(seed: int = 0, **shapes: tuple[Any, ...]) -> list[dict[str, Tensor]]:
    """Samples as dicts: of whole numbers below a shape's first entry, or of normal ones where it is None."""
    generator, count = torch.Generator().manual_seed(seed), BATCH * BATCHES
    columns = {
        name: torch.randn(count, *shape, generator=generator)
        if below is None
        else torch.randint(below, (count, *shape), generator=generator)
        for name, (below, *shape) in shapes.items()
    }
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def dicts(**shapes: tuple[Any, ...]) -> DataLoader[Any]:
    return DataLoader(_rows(**shapes), BATCH)  # type: ignore[arg-type]


def sentences() -> DataLoader[Any]:
    """Each its own target, as of a causal language model."""
    rows = [{"input_ids": row["ids"], "labels": row["ids"]} for row in _rows(ids=(50, 12))]
    return DataLoader(rows, BATCH)  # type: ignore[arg-type]


def pairs(**shapes: tuple[Any, ...]) -> DataLoader[Any]:
    rows = _rows(**shapes)
    return DataLoader(TensorDataset(*(torch.stack([row[name] for row in rows]) for name in shapes)), BATCH)


def boxes() -> DataLoader[Any]:
    target = {"boxes": torch.tensor([[2.0, 2, 20, 20]]), "labels": torch.tensor([1])}
    rows = [(row["image"].abs().clamp(max=1), target) for row in _rows(image=(None, 3, 32, 32))]
    return DataLoader(rows, BATCH, collate_fn=lambda items: tuple(map(list, zip(*items, strict=True))))  # type: ignore[arg-type]


def graphs() -> DataLoader[Any]:
    data, loaders = pytest.importorskip("torch_geometric.data"), pytest.importorskip("torch_geometric.loader")
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    made = [
        data.Data(x=row["x"][: 3 + i % 2], edge_index=edges, y=row["y"])
        for i, row in enumerate(_rows(x=(None, 4, 4), y=(3, 1)))
    ]
    return loaders.DataLoader(made, BATCH)


def dense_graphs() -> DataLoader[Any]:
    geometric = pytest.importorskip("torch_geometric")

    def dense(items: list[Any]) -> dict[str, Tensor]:
        batch = geometric.data.Batch.from_data_list(items)
        x, mask = geometric.utils.to_dense_batch(batch.x, batch.batch, max_num_nodes=4)
        adjacency = geometric.utils.to_dense_adj(batch.edge_index, batch.batch, max_num_nodes=4)
        return {"x": x, "mask": mask, "adjacency": adjacency, "y": batch.y}

    return DataLoader(graphs().dataset, BATCH, collate_fn=dense)


@dataclass(frozen=True)
class Architecture:
    """One row: the module and its data, and a network of the size that people use, without memory for its weights."""

    build: Callable[[], pl.LightningModule]
    data: Callable[[], DataLoader[Any]]
    usual: Callable[[], nn.Module] | None = None


_SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
ARCHITECTURES = {
    "GPT-2": Architecture(
        lambda: LossInside(partial(gpt2, vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=2)),
        sentences,
        gpt2,
    ),
    "BERT": Architecture(
        lambda: LossInside(partial(bert, **_SMALL, max_position_embeddings=12)),
        lambda: dicts(input_ids=(50, 12), attention_mask=(2, 12), labels=(2,)),
        bert,
    ),
    "ViT": Architecture(
        lambda: Supervised(partial(vit, img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=10)),
        lambda: pairs(x=(None, 3, 16, 16), y=(10,)),
        vit,
    ),
    "ResNet": Architecture(
        lambda: Supervised(partial(resnet, channels=(8, 8, 16, 16), stem_width=8), sgd),
        lambda: pairs(x=(None, 3, 32, 32), y=(10,)),
        partial(vit, "resnet50"),
    ),
    "UNet": Architecture(lambda: Supervised(UNet), lambda: pairs(x=(None, 3, 16, 16), y=(3, 16, 16))),
    "Faster R-CNN": Architecture(lambda: Detector(faster_rcnn, sgd), boxes),
    "graph network": Architecture(lambda: GraphClassifier(GraphNetwork), graphs),
    "GAN": Architecture(Gan, lambda: loader(BATCH * BATCHES, BATCH)),
    "autoencoder": Architecture(Autoencoder, lambda: loader(BATCH * BATCHES, BATCH)),
    "PINN": Architecture(
        lambda: Pinn(
            lambda: nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        ),
        lambda: pairs(x=(None, 1)),
    ),
    "temporal fusion transformer": Architecture(
        lambda: Forecaster(TemporalFusion),
        lambda: dicts(x=(None, 6, 4), series=(5,), target=(None, 3)),
    ),
}
