"""Networks and batches of other libraries: what is read of them, and what is said where nothing can be."""

import logging
from collections import UserDict
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor
from lightning_graphon.callbacks._module.pool import draw_probe
from lightning_graphon.callbacks._module.probe import repeat_batch, samples, take
from tests.callbacks.test_network import at_start, network_of
from tests.helpers.modules import Classifier, digits, loader, make_trainer, quiet


def monitors(**kwargs):
    options = {"figure": False, "verbose": False, **kwargs}
    return LossDecayMonitor(predict="kernel", every_n_steps=1, probe_size=6, **options), GraphonMonitor(**options)


def fit(model, data, *callbacks):
    torch.manual_seed(0)
    make_trainer(*callbacks, limit_train_batches=2).fit(model, data)


def same_masks(model_of, data, method):
    """Masks of two modules with the same network."""
    pruners = [quiet(method, 0.7) for _ in range(2)]
    for pruner, model in zip(pruners, model_of, strict=True):
        fit(model, data(), pruner)
    return all(torch.equal(a, b) for a, b in zip(pruners[0].masks.values(), pruners[1].masks.values(), strict=True))


# The loss inside the network


class Inside(nn.Module):
    """As networks of transformers: with labels it returns the loss, logits and hidden states."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(64, 16), nn.ReLU()), nn.Linear(16, 10)

    def forward(self, x, labels=None):
        hidden = self.body(x)
        logits = self.head(hidden)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "hidden": hidden, "length": len(x)}


class WithInside(Classifier):
    def __init__(self, inside, wrapped=False):
        super().__init__(lambda: nn.Sequential(Inside()) if wrapped else Inside())
        self.inside = inside

    def training_step(self, batch, batch_idx):
        return self(*batch)["loss"] if self.inside else F.cross_entropy(self(batch[0])["logits"], batch[1])

    def forward(self, *args):
        return (self.net[0] if isinstance(self.net, nn.Sequential) else self.net)(*args)


class Returned(WithInside):
    """The LightningModule's own forward returns the loss."""

    def training_step(self, batch, batch_idx):
        return self(*batch)

    def forward(self, *args):
        return super().forward(*args)["loss"]


@pytest.mark.parametrize("method", ["grasp", "synflow"])
@pytest.mark.parametrize("kind", [WithInside, partial(WithInside, wrapped=True), Returned], ids=["", "wrapped", "own"])
def test_masks_where_the_loss_is_inside(kind, method):
    assert same_masks([kind(True), WithInside(False)], loader, method)


def test_outputs_are_what_the_loss_is_computed_from():
    for inside in (False, True):
        model = WithInside(inside)
        network = network_of(model)
        with torch.no_grad():
            torch.testing.assert_close(network.outputs(), model.net(digits()[0][:24])["logits"])


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


class Encoder(Classifier):
    def __init__(self, inside):
        super().__init__(bert)
        self.inside = inside

    def training_step(self, batch, batch_idx):
        if self.inside:
            return self.net(**batch).loss
        return F.cross_entropy(self.net(input_ids=batch["input_ids"]).logits, batch["labels"])


def encodings():
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(50, (5,), generator=generator), "labels": i % 3} for i in range(16)]
    return DataLoader(rows, 4, collate_fn=lambda items: transformers.BatchEncoding(default_collate(items)))


@pytest.mark.parametrize("method", ["grasp", "synflow"])
def test_masks_of_transformers(method):
    assert same_masks([Encoder(True), Encoder(False)], encodings, method)


def test_monitors_of_transformers():
    loss, spectrum = monitors(raise_errors=True)
    fit(Encoder(True), encodings(), loss, spectrum)
    assert torch.isfinite(loss.curves["predicted"]).all()
    assert spectrum.spectrum is not None


# Batches


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "digits"


class Plain:
    def __init__(self, x, y):
        self.x, self.y, self.meta = x, y, {"name": "digits"}

    def to(self, device):
        return Plain(self.x.to(device), self.y.to(device))


class OwnDict(dict): ...


class Encoding(UserDict): ...


BATCHES = {
    "dataclass": lambda x, y: Batch(x, y),
    "object": Plain,
    "dict subclass": lambda x, y: OwnDict(x=x, y=y),
    "UserDict": lambda x, y: Encoding(x=x, y=y),
}


class OfAny(Classifier):
    def training_step(self, batch, batch_idx):
        pair = (batch["x"], batch["y"]) if hasattr(batch, "keys") else (batch.x, batch.y)
        return F.cross_entropy(self(pair[0]), pair[1])


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_kind(kind):
    data = loader(collate_fn=lambda rows: BATCHES[kind](*default_collate(rows)))
    network, plain = network_of(OfAny(), data), network_of(Classifier())
    assert torch.equal(network.inputs, plain.inputs)
    outputs = network.outputs().detach()
    assert float(network.loss(outputs)) == float(plain.loss(outputs))
    pruners = quiet("synflow"), quiet("synflow")
    fit(OfAny(), data, pruners[0])
    fit(Classifier(), loader(), pruners[1])
    assert pruners[0].masks == pruners[1].masks


def test_batches_without_samples(caplog):
    class Opaque:
        def __init__(self, pair):
            self._pair = pair

    class OfOpaque(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch._pair, batch_idx)

    said, curve = told(caplog, OfOpaque(), loader(collate_fn=lambda rows: Opaque(default_collate(rows))))
    assert said.count("no samples can be told apart in a batch of OfOpaque, which is a Opaque: let the collate") == 2
    assert len(curve) == 3


def told(caplog, model, data):
    """What the monitors say of a training, and the observed losses."""
    loss, spectrum = monitors()
    with caplog.at_level(logging.WARNING, "lightning_graphon"):
        fit(model, data, loss, spectrum)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert torch.isfinite(loss.curves["observed"]).all()
    return caplog.text, loss.curves["observed"]


def test_graphs(caplog):
    data = pytest.importorskip("torch_geometric.data")
    geometric = pytest.importorskip("torch_geometric")

    class Graphs(Classifier):
        def __init__(self):
            super().__init__(lambda: nn.ModuleList([geometric.nn.GCNConv(4, 8), nn.Linear(8, 3)]))

        def training_step(self, batch, batch_idx):
            hidden = geometric.nn.global_mean_pool(self.net[0](batch.x, batch.edge_index).relu(), batch.batch)
            return F.cross_entropy(self.net[1](hidden), batch.y)

    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    graphs = [data.Data(x=torch.randn(3 + i % 2, 4), edge_index=edges, y=torch.tensor([i % 3])) for i in range(12)]
    said, curve = told(caplog, Graphs(), geometric.loader.DataLoader(graphs, 4))
    assert said.count("no samples can be told apart in a batch of Graphs, which is a DataBatch") == 2
    assert len(curve) == 3


# Lists of images


def images(batch_size, sizes=(8,)):
    rows = [(torch.rand(3, sizes[i % len(sizes)], 8), {"labels": torch.tensor([i % 4])}) for i in range(12)]
    return DataLoader(rows, batch_size, collate_fn=lambda items: tuple(map(list, zip(*items, strict=True))))


class Detector(Classifier):
    def __init__(self):
        super().__init__(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        self.shapes = set()

    def training_step(self, batch, batch_idx):
        Detector.seen |= {tuple(x.shape) for x in batch[0]}
        assert len(batch[0]) == len(batch[1])
        return F.cross_entropy(self.logits(batch[0]), torch.cat([t["labels"] for t in batch[1]]))

    def logits(self, x):
        return self(torch.stack(x))


class Ragged(Detector):
    def logits(self, x):
        return torch.cat([self(image[None]) for image in x])


@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_lists_of_images(batch_size):
    Detector.seen = set()
    loss, spectrum = monitors(raise_errors=True)
    fit(Detector(), images(batch_size), loss, spectrum)
    assert Detector.seen == {(3, 8, 8)}
    assert torch.isfinite(loss.curves["predicted"]).all()
    assert len(spectrum.spectrum.eigenvalues) == 12


def test_images_of_several_sizes(caplog):
    Detector.seen = set()
    said, _ = told(caplog, Ragged(), images(4, (8, 9)))
    assert Detector.seen == {(3, 8, 8), (3, 9, 8)}
    assert said.count("Ragged.training_step has") == 2


def test_networks_for_detection(caplog):
    detection = pytest.importorskip("torchvision.models.detection")

    def net():
        backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8, padding=1), nn.ReLU())
        backbone.out_channels = 4
        anchors = detection.anchor_utils.AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
        return detection.FasterRCNN(
            backbone, rpn_anchor_generator=anchors, min_size=32, max_size=32,
            box_roi_pool=__import__("torchvision").ops.MultiScaleRoIAlign(["0"], 2, 0), box_head=nn.Flatten(),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, 3),
        )  # fmt: skip

    class Faster(Classifier):
        def __init__(self):
            super().__init__(net)

        def training_step(self, batch, batch_idx):
            return sum(self.net(*batch).values())

    target = {"boxes": torch.tensor([[2.0, 2, 20, 20]]), "labels": torch.tensor([1])}
    data = DataLoader(
        [(torch.rand(3, 32, 32), target)] * 8, 2, collate_fn=lambda rows: tuple(map(list, zip(*rows, strict=True)))
    )
    said, curve = told(caplog, Faster(), data)
    assert said.count("Faster.training_step works in train mode only (AttributeError") == 2
    assert len(curve) == 3


# Layouts of batches


def test_lists_of_samples_and_of_inputs():
    views = ([torch.zeros(6, 3), torch.zeros(6, 3)], torch.zeros(6))
    ragged = ([torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(5, 3)], torch.zeros(3))
    clouds = ([torch.zeros(9, 3)] * 4, torch.zeros(4))
    masks = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)]
    frames = ([torch.zeros(4, 5, 2), torch.zeros(4, 5, 2)], torch.zeros(4))
    unlabelled = [torch.zeros(3, 8, 8)] * 5
    loaders = [(torch.zeros(6, 2), torch.zeros(6)), (torch.zeros(6, 2), torch.zeros(6))]
    named = {"x": torch.zeros(2, 3), "names": ["a", "b"], "classes": ["a", "b", "c"]}
    detectron = [{"image": torch.zeros(3, 8, 8), "id": i} for i in range(4)]
    batches = [views, ragged, clouds, masks, frames, unlabelled, loaders, named, detectron]
    assert [samples(batch) for batch in batches] == [6, 3, 4, 3, 4, 5, 6, 2, 4]
    assert len(take(unlabelled, 2)) == 2
    assert [samples(take(batch, 2)) for batch in batches if batch is not unlabelled] == [2] * 8
    assert [samples(repeat_batch(batch)) for batch in batches] == [12, 6, 8, 6, 8, 10, 12, 4, 8]
    assert take(named, 1)["classes"] == ["a", "b", "c"]


def test_a_probe_of_graphs_or_the_like_draws_one_batch():
    class Counts(TensorDataset):
        drawn = 0

        def __getitem__(self, index):
            Counts.drawn += 1
            return super().__getitem__(index)

    at_start(lambda t, m: draw_probe(t, m, 24, 0), OfNothing(), DataLoader(Counts(*digits()), 4, collate_fn=set))
    assert Counts.drawn == 8, "one batch for the probe, one for training"


class OfNothing(Classifier):
    def training_step(self, batch, batch_idx):
        return self.net[0].weight.sum()


# Rows of outputs


class Tokens(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.embed, self.head, self.order = nn.Embedding(50, 8), nn.Linear(8, 5), order

    def forward(self, x):
        y = self.head(self.embed(x))
        return (y if self.order == "samples first" else y.transpose(0, 1)).reshape(-1, 5)


class Flat(Classifier):
    def __init__(self, order):
        super().__init__(lambda: Tokens(order))

    def training_step(self, batch, batch_idx):
        y = batch[1] if self.net.order == "samples first" else batch[1].T
        return F.cross_entropy(self(batch[0]), y.reshape(-1))


def tokens():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randint(5, (12, 4), generator=generator).repeat(1, 2)[:, :4],
                                    torch.randint(5, (12, 4), generator=generator)), 4)  # fmt: skip


def test_flattened_outputs_are_read_by_sample():
    network = network_of(Flat("samples first"), tokens(), size=6)
    assert network.outputs().shape == (6, 4, 5)
    assert torch.isfinite(network.loss(network.outputs().detach()))
    loss, spectrum = monitors(raise_errors=True)
    fit(Flat("samples first"), tokens(), loss, spectrum)
    assert torch.isfinite(loss.curves["predicted"]).all()


def test_rows_in_another_order_are_told(caplog):
    said, _ = told(caplog, Flat("tokens first"), tokens())
    assert said.count("samples cannot be told apart: return [samples, rows, ...]") == 2
