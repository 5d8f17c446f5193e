"""A network that is small from the first step is trained as the masked one is."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_graphon.callbacks import PruneAtInit
from lightning_graphon.compact import compact
from lightning_graphon.pruning import Masks
from tests.helpers.compact_cases import Attending, Image, Stream, chain, random_masks, same, scramble, without
from tests.helpers.networks import Residual, seeded

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def train(model, masks, optimizer, batches):
    """Losses of masked training, written down as simply as it can be."""
    model.train()
    parameters = dict(model.named_parameters())
    step, losses = OPTIMIZERS[optimizer](model.parameters()), []
    for x, y in batches:
        for name, mask in masks.items():
            parameters[name].data.mul_(mask)
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs.mean(1) if outputs.ndim == 3 else outputs, y)
        step.zero_grad()
        loss.backward()
        for name, mask in masks.items():
            if parameters[name].grad is not None:
                parameters[name].grad.mul_(mask)
        step.step()
        losses.append(float(loss))
    return torch.tensor(losses, dtype=torch.float64)


def batches_of(shape, classes=3, count=25):
    generator = torch.Generator().manual_seed(5)
    draw = lambda: torch.randn(16, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(), torch.randint(classes, (16,), generator=generator)) for _ in range(count)]


class PlainNorm(nn.Module):
    """Batch norm without weights, of channels that are zero, and a layer that begins with zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=False)
        self.deep, self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = torch.relu(self.second(self.deep(torch.relu(self.norm(self.first(x))))))
        return self.head(x.mean((2, 3)))


CASES = {
    "chain": (lambda: chain(), (6,)),
    "no bias": (lambda: chain(bias=False), (6,)),
    "stream": (Stream, (4,)),
    "convolutions": (lambda: Image(1), (2, 8, 8)),
    "residual": (Residual, (2, 8, 8)),
    "plain norm": (PlainNorm, (2, 8, 8)),
    "attention": (Attending, (5, 6)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_masked_network(case, optimizer):
    build, shape = CASES[case]
    model = seeded(build).double()
    masks, batches = random_masks(model, density=0.7, dead=0.3), batches_of(shape, 2 if case == "attention" else 3)
    small = compact(model, masks, batches[0][0], mode="training")
    assert small.report.parameters.after < small.report.parameters.before
    expected = train(dense := copy.deepcopy(model), masks, optimizer, batches)
    found = train(small.model, small.masks, optimizer, batches)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (expected[0] - expected[-1]).abs() > 1e-3
    # Back to the dense keys: the plain model gives the same, also with running statistics.
    plain = build().double()
    plain.load_state_dict(small.expand_state_dict())
    x = batches_of(shape)[1][0]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), dense.eval()(x), rtol=1e-8, atol=1e-8)


def test_a_unit_with_a_bias_and_no_input_learns():
    model = seeded(chain).double()
    masks = without(model, **{"0__out": [1, 4], "2__in": [5]})
    training, inference = (compact(model, masks, torch.rand(4, 6).double(), mode=m) for m in ("training", "inference"))
    assert training.model[0].out_features == 11
    assert inference.model[0].out_features == 9
    batches = batches_of((6,))
    expected = train(copy.deepcopy(model), masks, "sgd", batches)
    assert (train(inference.model, inference.masks, "sgd", batches) - expected).abs().max() > 1e-6


@pytest.mark.parametrize("norm", [True, False])
def test_a_bias_that_begins_at_zero_learns(norm):
    """Of a layer, or of batch norm; the function that follows has a slope at zero."""
    model = seeded(
        lambda: nn.Sequential(nn.Linear(6, 12, bias=not norm), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3))
    )
    if not norm:
        model[1] = nn.Identity()
        nn.init.zeros_(model[0].bias)
    model, batches = model.double(), batches_of((6,))
    masks = without(model, **{"0__out": [1, 4], "3__in": [5]})
    small = compact(model, masks, batches[0][0], mode="training")
    assert small.model[0].out_features == 11
    expected = train(copy.deepcopy(model), masks, "sgd", batches)
    torch.testing.assert_close(train(small.model, small.masks, "sgd", batches), expected, rtol=1e-9, atol=1e-9)


def test_a_frozen_bias_of_zero_does_not_learn():
    model = seeded(chain).double()
    masks = without(model, **{"0__out": [1, 4]})
    model[0].bias.requires_grad_(False)
    assert compact(model, masks, torch.rand(4, 6).double(), mode="training").model[0].out_features == 12
    model[0].bias.zero_()
    assert compact(model, masks, torch.rand(4, 6).double(), mode="training").model[0].out_features == 10


def test_a_running_mean_is_not_zero_at_once():
    """Of a loaded network: batches give zero, evaluation does not."""
    model = seeded(PlainNorm).double()
    masks = without(model, first__out=[0, 3])
    x = torch.rand(4, 2, 8, 8).double()
    assert compact(model, masks, x, mode="training").model.first.out_channels == 6
    model.norm.running_mean[3] = 0.5
    assert compact(model, masks, x, mode="training").model.first.out_channels == 7


def test_weights_that_are_zero_and_kept_stay():
    """As in the last layer of many residual blocks: zero is where they begin."""
    model = seeded(chain).double()
    nn.init.zeros_(model[4].weight)
    small = compact(
        model, {"4.weight": torch.ones(3, 10, dtype=torch.bool)}, torch.rand(4, 6).double(), mode="training"
    )
    assert small.report.parameters.after == small.report.parameters.before


def test_outputs_that_only_training_has_are_read():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.helper = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return (self.second(x), self.helper(x)) if self.training else self.second(x)

    model = Auxiliary()
    masks = without(model, second__in=[1, 2], helper__in=[2])
    small = compact(model, masks, torch.rand(4, 4), mode="training").model
    assert small.first.out_features == 7
    assert small.train()(torch.rand(2, 4))[1].shape == (2, 3)


def test_folded_networks_do_not_go_back():
    model = chain()
    small = compact(model, random_masks(model), torch.rand(4, 6))
    with pytest.raises(ValueError, match="folded"):
        small.expand_state_dict()


def test_other_states_are_refused():
    model = chain()
    small = compact(model, random_masks(model), torch.rand(4, 6), mode="training")
    with pytest.raises(ValueError, match="not a state dict"):
        small.expand_state_dict({})
    with pytest.raises(ValueError, match="shape"):
        small.expand_state_dict(model.state_dict())


def test_masks_and_numbers_survive_a_file(tmp_path):
    model = scramble(chain()).double()
    masks = random_masks(model)
    small = compact(model, masks, torch.rand(4, 6).double(), mode="training")
    torch.save(small, tmp_path / "small.pt")
    again = torch.load(tmp_path / "small.pt", weights_only=False)
    assert again.masks == small.masks
    same(model, masks, again, torch.rand(3, 6).double())
    model.load_state_dict(again.expand_state_dict())
    same(model, masks, again, torch.rand(3, 6).double())


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.losses = scramble(seeded(chain)).double(), []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_in_lightning_with_the_masks_given(tmp_path):
    """The fit of the masked network, and a checkpoint that the plain module loads."""
    batches = batches_of((6,), count=8)
    data = TensorDataset(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    model = Module()
    masks = Masks({f"net.{name}": mask for name, mask in random_masks(model.net).items()})
    small = compact(model, masks, batches[0][0], mode="training")
    for module, given in ((model, masks), (small.model, small.masks)):
        trainer = pl.Trainer(
            max_epochs=2, callbacks=[PruneAtInit.from_masks(given, verbose=False)], logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, 16))
    assert len(model.losses) == 16
    torch.testing.assert_close(torch.tensor(small.model.losses), torch.tensor(model.losses), rtol=1e-9, atol=1e-9)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    state = torch.load(tmp_path / "small.ckpt", weights_only=False)["state_dict"]
    plain = Module()
    plain.load_state_dict(small.expand_state_dict(state))
    x = batches[3][0]
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-9, atol=1e-9)
