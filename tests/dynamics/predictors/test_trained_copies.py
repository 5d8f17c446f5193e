"""Replay and rehearsal against the training that they predict."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_graphon.dynamics import (
    PoolBatches,
    Training,
    UnsupportedTrainingError,
    linearize,
    rehearse,
    replay,
)
from lightning_graphon.pruning import Masks, prune
from tests.dynamics.predictors.test_taylor import SmallGPT, cnn
from tests.helpers.networks import seeded


class Lion(Optimizer):
    """Signs of a mean of gradients; with an attribute of its own, which torch's copies of optimizers drop."""

    def __init__(self, params, lr, betas=(0.9, 0.99), decay=0.0):
        super().__init__(params, {"lr": lr})
        self.betas, self.decay = betas, decay

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * self.decay)
                p.sub_(group["lr"] * torch.lerp(p.grad, mean, self.betas[0]).tanh())
                mean.lerp_(p.grad, 1 - self.betas[1])


class Lookahead:
    """Wraps an optimizer and calls nothing of torch's."""

    def __init__(self, inner, k=2):
        self.inner, self.k, self.count = inner, k, 0
        self.slow = [[p.detach().clone() for p in g["params"]] for g in inner.param_groups]

    @property
    def param_groups(self):
        return self.inner.param_groups

    @property
    def state(self):
        return self.inner.state

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)

    def zero_grad(self):
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self):
        self.inner.step()
        self.count += 1
        if self.count % self.k == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, s in zip(group["params"], slow, strict=True):
                    p.copy_(s.lerp_(p, 0.5))


OPTIMIZERS = {
    "SGD": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: Adam(p, 0.01, weight_decay=0.1),
    "AMSGrad": lambda p: Adam(p, 0.01, amsgrad=True),
    "AdamW": lambda p: AdamW(p, 0.01, weight_decay=0.1),
    "RMSprop": lambda p: RMSprop(p, 0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: Adagrad(p, 0.05, lr_decay=0.01),
    "NAdam": lambda p: NAdam(p, 0.01),
    "Lion": lambda p: Lion(p, 0.01, decay=0.1),
    "Lookahead": lambda p: Lookahead(SGD(p, 0.1, momentum=0.9)),
}
SCHEDULES = {
    "cosine": lambda o: [CosineAnnealingLR(o, 30)],
    "one cycle": lambda o: [OneCycleLR(o, 0.05, total_steps=40, cycle_momentum=False)],
    "warm-up": lambda o: [SequentialLR(o, [LinearLR(o, 0.1, total_iters=5), ExponentialLR(o, 0.9)], [5])],
    "every third step": lambda o: [(StepLR(o, 2), 3)],
}


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count=24, size=8, inputs=6, classes=5):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, size, inputs, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(classes, (count, size), generator=generator), strict=True))


def linear_network():
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5))).double()


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))).double()


def probe_of(model):
    return float(cross_entropy(model, batches(1, 32)[0]))


def trained(training, data, last):
    """What really happens: losses of the probe after each step until `last`."""
    losses = []
    for step in training.run(data * 3):
        with torch.no_grad():
            modes = [m.training for m in training.model.modules()]
            losses.append(probe_of(training.model.eval()))
            for module, mode in zip(training.model.modules(), modes, strict=True):
                module.training = mode
        if step == last:
            break
    return torch.tensor(losses, dtype=torch.float64)


def begun(model, optimizer, **settings):
    """A training that has taken five steps."""
    training = Training(model, optimizer, cross_entropy, **settings)
    for _ in training.run(batches(20)[-5 * training.accumulate :]):
        pass
    return training


def assert_predicted(training, exactly=False):
    """By both, from where it is; the replay's arithmetic differs from the network's, by rounding only."""
    data, first = batches(), training.steps_done
    steps = range(first, first + 21)
    rehearsed = rehearse(training, data, probe_of, steps)
    replayed = None if exactly else replay(training, data, probe_of, steps)
    observed = trained(training, data, first + 20)
    assert torch.equal(rehearsed.losses[0], observed)
    assert observed[0] != observed[-1]
    if replayed is not None:
        torch.testing.assert_close(replayed.losses[0], observed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exact_for_a_linear_network(name):
    model = linear_network()
    assert_predicted(begun(model, OPTIMIZERS[name](model.parameters())))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["momentum", "AdamW", "Lion"])
def test_exact_with_schedules_groups_clipping_and_accumulation(name, schedule):
    model = linear_network()
    groups = [{"params": [model[1].weight]}, {"params": [model[1].bias], "lr": 0.03}]
    optimizer = OPTIMIZERS[name](groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = {"schedulers": SCHEDULES[schedule](optimizer), "accumulate": 2}
        training = begun(model, optimizer, **settings, clip_grad_norm=0.3, clip_grad_value=0.1)
        assert_predicted(training)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rehearsal_is_the_training(name):
    model = mlp()
    masks = prune(model, "magnitude", sparsity=0.5)
    assert_predicted(begun(model, OPTIMIZERS[name](model.parameters()), masks=masks), exactly=True)


def test_a_rehearsal_with_dropout_and_batch_norm_is_the_training():
    """Which draws the numbers that the generator would give; measuring draws none."""
    model = seeded(
        lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 5))
    ).double()
    assert_predicted(begun(model, Adam(model.parameters(), 0.01)), exactly=True)


def test_lbfgs_is_rehearsed_and_not_replayed():
    model = mlp()
    training = Training(model, torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3), cross_entropy)
    with pytest.raises(UnsupportedTrainingError, match="LBFGS evaluates the loss several times per step.*rehearsal"):
        replay(training, batches(), probe_of, [0, 1])
    assert_predicted(training, exactly=True)


def test_replay_is_training_of_the_linearised_network():
    model, data = mlp(), batches()
    predicted = replay(Training(model, Adam(model.parameters(), 0.01), cross_entropy), data, probe_of, range(21))
    linear = linearize(model)
    observed = trained(Training(linear, Adam(linear.parameters(), 0.01), cross_entropy), data, 20)
    assert torch.equal(predicted.losses[0], observed)
    assert predicted.cost > 1


def test_order_two_is_exact_for_a_network_quadratic_in_its_parameters():
    model, data = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))).double(), batches()
    training = Training(model, Adam(model.parameters(), 0.01), cross_entropy)
    first, second = (replay(training, data, probe_of, range(21), order=order) for order in (1, 2))
    observed = trained(training, data, 20)
    torch.testing.assert_close(second.losses[0], observed, rtol=0, atol=1e-6)  # rounding
    assert float((first.losses[0] - observed).abs().max()) > 1e-3


@pytest.mark.parametrize("predict", [rehearse, replay])
def test_leaves_no_trace(predict):
    model = seeded(
        lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 5))
    ).double()
    model[1].eval()
    optimizer = Adam(model.parameters(), 0.01)
    schedule = CosineAnnealingLR(optimizer, 30)
    training = begun(model, optimizer, schedulers=[schedule])
    cross_entropy(model, batches()[0]).backward()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), schedule.state_dict()])
    grads = [p.grad.clone() for p in model.parameters()]
    random_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    pool = tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))
    predict(training, PoolBatches(pool, 8, orders=2), probe_of, [5, 9])
    after = [model.state_dict(), optimizer.state_dict(), schedule.state_dict()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert random.getstate() == random_state[1]
    assert np.array_equal(np.random.get_state()[1], random_state[2])
    assert [m.training for m in model] == [True, False, True, True]
    assert training.steps_done == 5


@pytest.mark.parametrize("name", ["Adam", "Lion", "Lookahead"])
def test_copies_share_nothing(name):
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    training = begun(model, optimizer, schedulers=[] if name == "Lookahead" else [StepLR(optimizer, 3)])
    copied = training.copy()
    assert type(copied.optimizer) is type(optimizer)
    assert [id(p) for g in copied.optimizer.param_groups for p in g["params"]] == [*map(id, copied.model.parameters())]
    assert {id(p) for p in copied.optimizer.state} == {*map(id, copied.model.parameters())}
    assert vars(copied.optimizer).keys() >= vars(optimizer).keys() - {"step"}
    for _ in copied.run(batches(4)):
        pass
    assert copied.steps_done == 9
    assert training.steps_done == 5


def test_pruned_weights_stay_zero():
    """And the expansion is one around the pruned network, also where its weights had not been zeroed yet."""
    model, seen = mlp(), []
    masks = Masks({"0.weight": torch.rand(16, 6) > 0.5, "2.weight": torch.rand(5, 16) > 0.5})

    def look(copied):
        weights = dict(copied.named_parameters())
        seen.append(max(float(weights[name][~mask].abs().max()) for name, mask in masks.items()))
        return probe_of(copied)

    training = Training(model, Lion(model.parameters(), 0.01, decay=0.1), cross_entropy, masks=masks)
    replayed = replay(training, batches(), look, range(10))
    assert seen == [0.0] * 10
    pruned = copy.deepcopy(model)
    masks.apply_(pruned)
    assert float(replayed.mean[0]) == pytest.approx(probe_of(pruned), rel=1e-12)
    assert bool((model[0].weight != 0).all())


def test_orders_make_a_band():
    model = mlp()
    pool = tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))
    training = Training(model, SGD(model.parameters(), 0.1), cross_entropy)
    predicted = rehearse(training, PoolBatches(pool, 8, orders=3), probe_of, range(0, 21, 5))
    assert predicted.losses.shape == (3, 5)
    assert bool((predicted.lower <= predicted.mean).all() and (predicted.mean <= predicted.upper).all())
    assert predicted.lower[0] == predicted.upper[0]
    assert predicted.lower[-1] < predicted.upper[-1]
    again = rehearse(training, PoolBatches(pool, 8, orders=3), probe_of, range(0, 21, 5))
    assert torch.equal(predicted.losses, again.losses)


def test_time_ends_it():
    model, told = mlp(), []
    training = Training(model, SGD(model.parameters(), 0.1), cross_entropy)
    predicted = rehearse(
        training,
        batches(),
        probe_of,
        range(100_000),
        seconds=0.2,
        progress=lambda order, step: told.append((order, step)),
    )
    assert predicted.until == told[-1][1] > 0
    assert told[:3] == [(0, 0), (0, 1), (0, 2)]
    pool = tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))
    assert rehearse(training, PoolBatches(pool, 8, orders=2), probe_of, [0, 10**9], seconds=0).steps.tolist() == [0]


def test_divergence_ends_it():
    model = mlp()
    training = Training(model, SGD(model.parameters(), 1e200), cross_entropy)
    predicted = rehearse(training, batches(), probe_of, range(20))
    assert not predicted.losses[0, -1].isfinite()
    assert predicted.losses[0, :-1].isfinite().all()
    assert predicted.until == int(predicted.steps[-2])


def test_arguments():
    model = mlp()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="moves no parameter"):
        Training(mlp(), optimizer, cross_entropy)
    with pytest.raises(ValueError, match="accumulate must be positive, got 0"):
        Training(model, optimizer, cross_entropy, accumulate=0)
    with pytest.raises(ValueError, match="waits for a metric"):
        Training(model, optimizer, cross_entropy, [ReduceLROnPlateau(optimizer)])
    with pytest.raises(ValueError, match="step 0 is over: 3 have been done"):
        rehearse(Training(model, optimizer, cross_entropy, steps_done=3), batches(), probe_of, [0])
    with pytest.raises(ValueError, match="no batch to train on"):
        rehearse(Training(model, optimizer, cross_entropy), [], probe_of, [1])
    assert rehearse(Training(model, optimizer, cross_entropy), batches(), probe_of, []).until is None


@pytest.mark.parametrize("build", [lambda: cnn(nn.BatchNorm2d), lambda: SmallGPT(0.1)], ids=["cnn", "gpt"])
def test_small_networks_are_replayed(build):
    """For a few small steps the linearised network is the network."""
    model = seeded(build).double()
    gpt = isinstance(model, SmallGPT)
    x = torch.arange(72).reshape(12, 6).square() % 11 if gpt else torch.randn(12, 2, 10, 10).double()
    y = torch.arange(72).reshape(12, 6) % 11 if gpt else torch.arange(12) % 3

    def loss(network, batch):
        return F.cross_entropy(network(batch[0]).flatten(0, -2), batch[1].flatten())

    training = Training(model, AdamW(model.parameters(), 1e-4), loss)
    both = [p(training, [(x, y)], lambda m: loss(m, (x, y)), [0, 2, 5]) for p in (replay, rehearse)]
    moved = float(both[1].mean[0] - both[1].mean[-1])
    assert abs(moved) > 1e-4
    assert float((both[0].mean - both[1].mean).abs().max()) < 0.05 * abs(moved)  # curvature, at these small steps


def test_the_loop_is_the_one_that_people_write():
    """With accumulation, clipping, a schedule of every third step, and a probe that draws numbers."""
    model, data = mlp(), batches()
    mine = copy.deepcopy(model)
    optimizer, other = AdamW(mine.parameters(), 0.01), AdamW(model.parameters(), 0.01)
    schedule, expected = StepLR(optimizer, 1, gamma=0.5), [probe_of(mine)]
    for step in range(1, 9):
        optimizer.zero_grad()
        for batch in data[2 * step - 2 : 2 * step]:
            (cross_entropy(mine, batch) / 2).backward()
        nn.utils.clip_grad_value_(mine.parameters(), 0.2)
        nn.utils.clip_grad_norm_(mine.parameters(), 0.5)
        optimizer.step()
        if step % 3 == 0:
            schedule.step()
        expected.append(probe_of(mine))
    settings = {"accumulate": 2, "clip_grad_norm": 0.5, "clip_grad_value": 0.2}
    training = Training(model, other, cross_entropy, [(StepLR(other, 1, gamma=0.5), 3)], **settings)
    assert rehearse(training, data, probe_of, range(9)).losses[0].tolist() == expected


def test_a_probe_that_draws_numbers_does_not_move_the_training():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Linear(16, 5))).double()
    training = Training(model, Adam(model.parameters(), 0.01), cross_entropy)
    often = rehearse(training, batches(), lambda m: probe_of(m) + 0 * float(torch.rand(1)), range(11))
    assert often.losses[0, -1] == rehearse(training, batches(), probe_of, [10]).losses[0, 0]
