"""Probe batches, `training_step` as a network, and its loss as a function of the outputs."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_graphon.callbacks import LossDecayMonitor
from lightning_graphon.callbacks._module.network import TrainingStepNetwork
from lightning_graphon.callbacks._module.pool import draw_probe
from lightning_graphon.callbacks._module.probe import labels_of, per_sample, samples, take, with_samples
from lightning_graphon.callbacks._module.training_step import TrainingStepObjective
from lightning_graphon.dynamics import UnsupportedTrainingError
from lightning_graphon.dynamics.recorded_loss import recorded_loss
from lightning_graphon.ntk import empirical_ntk
from tests.helpers.modules import Autoencoder, Classifier, digits, loader, make_trainer, quiet


class At(Callback):
    """Does something at the start of training and keeps what comes out."""

    def __init__(self, work):
        self.work, self.result = work, None

    def on_train_start(self, trainer, pl_module):
        self.result = self.work(trainer, pl_module)


def at_start(work, model=None, data=None):
    callback = At(work)
    make_trainer(callback, limit_train_batches=1).fit(model or Classifier(), loader() if data is None else data)
    return callback.result


def network_of(model, data=None, size=24):
    def read(trainer, pl_module):
        batch = draw_probe(trainer, pl_module, size, 0)
        return TrainingStepNetwork(pl_module, TrainingStepObjective(trainer, pl_module), batch)

    return at_start(read, model, data)


# The probe


def test_joined_and_cut():
    x, y = digits()
    for size, batch_size in ((24, 16), (96, 7), (5, 16)):
        probe = at_start(lambda t, m, size=size: draw_probe(t, m, size, 0), data=loader(batch_size=batch_size))
        assert torch.equal(probe[0], x[:size])
        assert torch.equal(probe[1], y[:size])


def test_shuffled_by_the_seed_alone():
    def probes(trainer, pl_module):
        return [draw_probe(trainer, pl_module, 24, seed)[1] for seed in (0, 0, 1)]

    torch.manual_seed(1)
    first = at_start(probes, data=loader(shuffle=True))
    torch.manual_seed(2)
    second = at_start(probes, data=loader(shuffle=True))
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], first[2])


def rows(n):
    x, y = digits()
    return [{"x": x[i], "y": y[i], "name": str(i)} for i in range(n)]


def collated(weights):
    def collate(items):
        plain = torch.utils.data.default_collate(items)
        return {**plain, "weights": torch.arange(weights).float(), "scale": torch.tensor(2.0)}

    return collate


def test_dict_batches_with_things_that_are_not_samples():
    data = DataLoader(rows(40), 16, collate_fn=collated(10))
    probe = at_start(lambda t, m: draw_probe(t, m, 24, 0), Weighted(), data)
    assert samples(probe) == 24
    assert torch.equal(probe["x"], digits()[0][:24])
    assert probe["name"] == [str(i) for i in range(24)]
    assert torch.equal(probe["weights"], torch.arange(10.0)), "class weights belong to the batch, not to its samples"
    assert probe["scale"] == 2.0


class Weighted(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["x"]), batch["y"], weight=1 + batch["weights"]) * batch["scale"]


def test_batches_that_cannot_be_joined():
    ragged = [(torch.zeros(4, n), torch.zeros(4).long()) for n in (3, 5)]

    class Ragged(Classifier):
        def training_step(self, batch, batch_idx):
            return self.net[4].weight.sum()

    probe = at_start(lambda t, m: draw_probe(t, m, 6, 0), Ragged(), DataLoader(ragged, batch_size=None))
    assert probe[0].shape == (4, 3)


def test_parts_of_a_batch():
    batch = [torch.arange(6).reshape(3, 2), {"a": torch.arange(3), "b": torch.zeros(2)}, ["x", "y", "z"]]
    assert [t.shape for t in per_sample(batch)] == [(3, 2), (3,)]
    cut = take(batch, 2)
    assert (len(cut[0]), len(cut[1]["a"]), len(cut[1]["b"]), cut[2]) == (2, 2, 2, ["x", "y"])
    other = with_samples(batch, (torch.ones(1, 2), torch.ones(1)))
    assert other[0].shape == (1, 2)
    assert other[1]["a"].shape == (1,)
    assert other[1]["b"] is batch[1]["b"]
    assert labels_of(batch) is None
    assert labels_of((torch.zeros(3, 2), torch.arange(3))) is not None
    assert labels_of((torch.zeros(3, 2), torch.zeros(3))) is None, "numbers are not classes"


# The network


def same_kernel(network, module, inputs):
    found = network.empirical(empirical_ntk, torch.float64, reduce=None)
    expected = empirical_ntk(copy.deepcopy(module).double(), inputs.double(), reduce=None)
    torch.testing.assert_close(found, expected)


def test_a_single_call_is_the_module_itself():
    model = Classifier()
    network = network_of(model)
    assert network.module is model
    assert torch.equal(network.labels, digits()[1][:24])
    with torch.no_grad():
        assert torch.equal(network.outputs(), model(digits()[0][:24]))


def test_several_calls_have_the_kernel_of_the_whole():
    model = Autoencoder()
    network = network_of(model)
    assert network.module is not model
    assert isinstance(network.inputs, tuple)
    same_kernel(network, nn.Sequential(model.encoder, model.decoder), digits()[0][:24])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_masks_and_preconditioners_by_the_networks_own_names():
    model = Autoencoder()
    network = network_of(model)
    own = network.inside({"encoder.0.weight": torch.ones(32, 64)})
    assert set(own) == {"pl_module.encoder.0.weight"}
    assert set(own) <= dict(network.module.named_parameters()).keys()


def test_dict_batches():
    model = Weighted()
    data = DataLoader(rows(40), 16, collate_fn=collated(10))
    network = network_of(model, data)
    with torch.no_grad():
        expected = F.cross_entropy(model(digits()[0][:24]), digits()[1][:24], weight=1 + torch.arange(10.0)) * 2
        assert float(network.loss(network.outputs())) == pytest.approx(float(expected), rel=1e-6)
    same_kernel(network, model, digits()[0][:24])


def test_two_networks_with_outputs_of_their_own():
    class Two(Classifier):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch[0]).mean() + self.net[:3](batch[0]).mean()

    with pytest.raises(UnsupportedTrainingError, match=r"Two.training_step has 2 outputs, of several networks"):
        network_of(Two())


def test_outputs_that_are_not_one_row_a_sample():
    class Mean(Classifier):
        def __init__(self):
            super().__init__(lambda: nn.Sequential(nn.Linear(64, 3), Pool()))

        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum()

    with pytest.raises(UnsupportedTrainingError, match=r"\(3,\), not a tensor with rows for each sample"):
        network_of(Mean())


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(0)


# The loss


def one_hot(y):
    return F.one_hot(y, 10).float()


def in_place(outputs, y):
    loss = F.cross_entropy(outputs, y)
    loss += 0.1 * outputs.square().mean()
    return loss


def reads_a_value(outputs, y):
    loss = F.cross_entropy(outputs, y)
    assert loss.item() > -1
    return loss


LOSSES = {
    "cross-entropy": F.cross_entropy,
    "class weights": lambda o, y: F.cross_entropy(o, y, weight=1 + torch.arange(10.0)),
    "label smoothing": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    "sum": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    "mse": lambda o, y: F.mse_loss(o, one_hot(y)),
    "bce": lambda o, y: F.binary_cross_entropy_with_logits(o, one_hot(y), pos_weight=torch.full((10,), 3.0)),
    "masked": lambda o, y: F.mse_loss(o.masked_fill(one_hot(y) > 0, 0.5), one_hot(y)),
    "in place": in_place,
    "reads a value": reads_a_value,
}


class WithLoss(Classifier):
    def __init__(self, loss):
        super().__init__()
        self.own_loss = loss

    def training_step(self, batch, batch_idx):
        return self.own_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize("name", LOSSES)
def test_recorded_loss_and_gradient(name):
    loss, y = LOSSES[name], digits()[1][:24]
    network = network_of(WithLoss(loss))
    outputs = network.outputs().detach()
    recorded = recorded_loss(network, outputs)
    assert recorded.reads_values == (name in ("reads a value", "mse", "bce", "masked")), "one_hot looks for the largest"
    for seed in (1, 2):
        torch.manual_seed(seed)
        leaf = torch.randn(24, 10, requires_grad=True)
        expected = loss(leaf, y)
        (slope,) = torch.autograd.grad(expected, leaf)
        value, gradient = recorded.value_and_gradient(leaf.detach().double())
        assert value.dtype == gradient.dtype == torch.float64
        # The oracle is in single precision.
        torch.testing.assert_close(value.float(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.float(), slope, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(recorded(leaf.detach().double()), value)


def branches(outputs, y):
    loss = F.cross_entropy(outputs, y)
    return loss if loss > 1.5 else 2 * loss


REFUSED = {
    "branches": (branches, "branches on the outputs"),
    "random": (lambda o, y: F.cross_entropy(F.dropout(o, 0.5), y), "something else each time"),
    "constant": (lambda o, y: o.sum() * 0, "does not depend on the network's outputs"),
    "detached": (lambda o, y: o.detach().sum(), "does not depend on the network's outputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_losses_that_are_no_functions(name):
    loss, why = REFUSED[name]
    network = network_of(WithLoss(lambda o, y: F.cross_entropy(o, y)))
    network.root.own_loss = loss
    with pytest.raises(UnsupportedTrainingError, match=why):
        recorded_loss(network, network.outputs().detach())


def test_a_recording_changes_nothing_and_draws_nothing():
    class Counts(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            outputs = self(batch[0] + torch.randn_like(batch[0]))
            self.seen += outputs.detach().sum()
            return F.cross_entropy(outputs, batch[1])

    model = Counts()
    network = network_of(model)
    recorded = recorded_loss(network, network.outputs().detach())
    seen, state = model.seen.clone(), torch.get_rng_state()
    recorded.value_and_gradient(torch.randn(24, 10, generator=torch.Generator().manual_seed(0)).double())
    recorded(torch.zeros(24, 10).double())
    assert torch.equal(model.seen, seen)
    assert torch.equal(torch.get_rng_state(), state)


# What a loss may do besides


def contrastive(outputs, y):
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T / 0.1 - 100 * torch.eye(len(z)), torch.arange(len(z)).roll(1))


COUPLED = {
    "contrastive": (contrastive, True),
    "root of a mean": (lambda o, y: F.mse_loss(o, one_hot(y)).sqrt() + o.mean() ** 2, True),
    "mean": (F.cross_entropy, False),
    "sum": (lambda o, y: F.cross_entropy(o, y, reduction="sum"), False),
    "weighted mean": (lambda o, y: F.cross_entropy(o, y, weight=1 + torch.arange(10.0)), False),
    "ignored samples": (lambda o, y: F.cross_entropy(o, y.where(y > 3, -100)), False),
}


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_samples(name):
    loss, couples = COUPLED[name]
    assert network_of(WithLoss(loss)).couples_samples() == couples


class Pairs(Classifier):
    """Inputs against fixed targets of the whole batch, as CLIP with a frozen text encoder."""

    def training_step(self, batch, batch_idx):
        targets = F.normalize(batch[0][:, :10], dim=1)
        return F.cross_entropy(self(batch[0]) @ targets.T, torch.arange(len(targets)))


@pytest.mark.parametrize(("size", "times"), [(24, 1), (16, 0)])
def test_that_the_predicted_fall_is_biased_is_told_once(size, times, caplog):
    assert network_of(Pairs()).couples_samples()
    monitor = LossDecayMonitor(predict="kernel", every_n_steps=1, probe_size=size, figure=False, verbose=False)
    make_trainer(monitor).fit(Pairs(), loader())
    assert caplog.text.count("Training batches of 16 and the probe of 24 have different losses") == times
    assert caplog.text.count("couples the samples") == times


class Physics(Classifier):
    """Differentiates the network by its inputs, as a physics-informed one."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return (slope - 1).square().mean()


def test_steps_that_differentiate(caplog):
    monitor = LossDecayMonitor(predict="kernel", every_n_steps=1, probe_size=8, figure=False, verbose=False)
    make_trainer(monitor).fit(Physics(), loader())
    assert torch.isfinite(monitor.curves["observed"]).all()
    assert len(monitor.curves["observed"]) == 4
    assert "no function of the network's outputs alone, as where it differentiates" in caplog.text


class Sparse(Classifier):
    def __init__(self):
        super().__init__(lambda: nn.Sequential(nn.EmbeddingBag(17, 8, sparse=True), nn.Linear(8, 10)))

    def forward(self, x):
        return self.net((16 * x).long())


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_sparse_gradients(method):
    model, pruner = Sparse(), quiet(method, 0.5, include="*")
    monitor = LossDecayMonitor(every_n_steps=1, probe_size=8, figure=False, verbose=False, raise_errors=True)
    model.make_optimizer = lambda parameters: torch.optim.SGD(parameters, 0.1)
    make_trainer(pruner, monitor).fit(model, loader())
    assert model.net[0].sparse
    assert torch.isfinite(monitor.curves["predicted"]).all()


# Derivatives of the network by its inputs, beside outputs


class Pinn(Classifier):
    """u′ = cos x inside and u = 0 on the boundary: of the points inside, the loss knows the derivative alone."""

    def __init__(self, boundary):
        super().__init__(lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)))
        self.boundary, self.scale = boundary, 1.0

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        slope = torch.autograd.grad(self.net(x).sum() / self.scale, x, create_graph=True)[0]
        edge = self.net(self.boundary) / self.scale
        return (slope - x.cos()).square().mean() + edge.square().mean()


def points():
    x = torch.linspace(0, 3, 48)[:, None]
    return DataLoader(torch.utils.data.TensorDataset(x), 16)


@pytest.mark.parametrize("boundary", [torch.zeros(16, 1), torch.tensor([[0.0], [3.0]])], ids=["as many", "few"])
def test_a_boundary_term_is_not_taken_for_the_whole(boundary):
    with pytest.raises(UnsupportedTrainingError, match="has 2 outputs, .*one that is called several times"):
        network_of(Pinn(boundary), points(), size=16)


def test_temperature_divides_what_is_differentiated_too():
    def losses(trainer, pl_module):
        batch = draw_probe(trainer, pl_module, 16, 0)
        cooled = TrainingStepObjective(trainer, pl_module).loss(batch, temperature=200.0)
        pl_module.scale = 200.0
        return cooled.item(), pl_module.training_step(batch, 0).item()

    cooled, expected = at_start(losses, Pinn(torch.zeros(16, 1)), points())
    assert cooled == pytest.approx(expected, rel=1e-6)  # float32


def test_a_call_whose_output_is_detached_is_no_output_of_the_loss():
    class PseudoLabels(Classifier):
        def training_step(self, batch, batch_idx):
            targets = self(batch[0]).detach().argmax(1)
            return F.cross_entropy(self(batch[0] + 0.1), targets)

    def places(trainer, pl_module):
        return TrainingStepObjective(trainer, pl_module).find_outputs(draw_probe(trainer, pl_module, 16, 0)).places

    assert at_start(places, PseudoLabels()) == [(1, 0)]
