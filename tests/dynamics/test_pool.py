"""Predictions with a pool that pushes a probe: exact for networks that are linear in their parameters."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, RMSprop

from lightning_graphon.dynamics import KernelPrediction, LossCurves, LossTracker, OptimizerView, ProbedNetwork

PROBE, POOL, EXACT = 6, 20, 1e-9  # rounding of some 30 steps in double precision


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(PROBE + POOL, 5, dtype=torch.float64, generator=generator)
    return x, x[:, :3].argmax(1)


def linear():
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


def tracked(net, optimizer, *, scale=1.0, pool=True, seconds=math.inf, **options):
    x, y = data()
    loss = partial(lambda labels, outputs: F.cross_entropy(outputs, labels), y[:PROBE])
    pool_loss = partial(lambda labels, outputs: F.cross_entropy(outputs, labels), y[PROBE:])
    return LossTracker(
        ProbedNetwork(net, x[:PROBE], loss), OptimizerView(optimizer, net), KernelPrediction(**options), LossCurves(),
        pool=ProbedNetwork(net, x[PROBE:], pool_loss) if pool else None, every_n_steps=1, gradient_scale=scale,
        seconds=lambda: seconds,
    )  # fmt: skip


def train(net, optimizer, tracker, steps, rows=lambda step: slice(None), before=lambda step: None, scale=1.0):
    """Observations of a tracker while the pool, or rows of it, train the network."""
    x, y = (t[PROBE:] for t in data())
    seen = [tracker.observe(0)]
    for step in range(steps):
        optimizer.zero_grad()
        (scale * F.cross_entropy(net(x[rows(step)]), y[rows(step)])).backward()
        before(step)
        tracker.advance()
        optimizer.step()
        seen.append(tracker.observe(step + 1))
    return seen


def one_by_one(step, last=10):
    """Single samples, and all of them from a step on."""
    return slice(step, step + 1) if step < last else slice(None)


def grouped(net, rates=(0.3, 0.03), **options):
    return SGD([{"params": net.weight, "lr": rates[0]}, {"params": net.bias, "lr": rates[1]}], **options)


SGDS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("sgd", SGDS)
@pytest.mark.parametrize("rates", [(0.2, 0.2), (0.3, 0.03)], ids=str)
def test_descent_on_the_pool_is_predicted_for_the_probe(sgd, rates):
    net = linear()
    optimizer = grouped(net, rates, **SGDS[sgd])
    seen = train(net, optimizer, tracked(net, optimizer), 30)
    assert [s["predicted"] for s in seen] == pytest.approx([s["observed"] for s in seen], rel=EXACT)
    assert abs(seen[-1]["observed"] / seen[0]["observed"] - 1) > 0.05, "a loss that stands still is easy to predict"


def test_a_probe_that_pushes_itself_is_predicted_otherwise():
    net = linear()
    optimizer = grouped(net, momentum=0.9)
    seen = train(net, optimizer, tracked(net, optimizer, pool=False), 30)
    assert seen[-1]["relative_error"] > 0.1


@pytest.mark.parametrize("sgd", SGDS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_refresh_begins_with_the_buffer_that_the_optimizer_has(sgd, scale):
    """Before the refresh single samples train, so that no steady gradient could stand for the buffer."""
    net = linear()
    optimizer = grouped(net, (0.3 / scale, 0.03 / scale), **SGDS[sgd])
    tracker = tracked(net, optimizer, scale=scale, refresh_every_n_steps=10)

    def rates(step):  # groups that change their ratio after the refresh
        optimizer.param_groups[1]["lr"] = (0.03 if step < 15 else 0.2) / scale

    seen = train(
        net,
        optimizer,
        tracker,
        19,
        rows=lambda k: slice(k, k + 1) if k < 10 else slice(None),
        before=rates,
        scale=scale,
    )
    assert "refreshed" not in seen[10]
    later = seen[11:]
    assert [s["refreshed"] for s in later] == pytest.approx([s["observed"] for s in later], rel=EXACT)
    assert later[-1]["relative_error"] > 1e-3


class FrozenAdam(Adam):
    """Adam whose second moments stand still from its tenth step on."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if state and float(state["step"]) >= 10:
                    square = state["exp_avg_sq"] / (1 - group["betas"][1] ** 10)
                    state["step"] += 1
                    state["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
                    unbiased = state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"]))
                    p -= group["lr"] * unbiased / (square.sqrt() + group["eps"])
                    p.grad = None
        super().step()  # of those that are left


@pytest.mark.parametrize("rates", [(0.03, 0.03), (0.03, 0.003)], ids=str)
def test_adam_with_a_frozen_preconditioner(rates):
    net = linear()
    groups = [{"params": net.weight, "lr": rates[0]}, {"params": net.bias, "lr": rates[1]}]
    optimizer = FrozenAdam(groups)
    seen = train(
        net,
        optimizer,
        tracked(net, optimizer, full=True),
        40,
        rows=lambda k: slice(k, k + 3) if k < 10 else slice(None),
    )
    later = seen[10:]
    assert [s["predicted"] for s in later] == pytest.approx([s["observed"] for s in later], rel=EXACT)
    assert abs(later[-1]["observed"] / later[0]["observed"] - 1) > 0.05


def jacobian(net, x):
    """[N·C, parameters]."""
    outputs = net(x).flatten()
    rows = [torch.autograd.grad(o, list(net.parameters()), retain_graph=True) for o in outputs]
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])


@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
def test_the_function_space_loop_of_a_network_that_is_not_linear(kind):
    """v = J P m and A = J P J' from autograd's Jacobians; one loop over both, at the weights of step 12."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    lr, beta, x, y = 0.02, 0.8, *data()
    adam = kind == "adam"
    optimizer = Adam(net.parameters(), lr, (beta, 0.9)) if adam else RMSprop(net.parameters(), lr, momentum=beta)
    tracker = tracked(net, optimizer, full=True, start_step=12)
    seen = train(net, optimizer, tracker, 12)
    assert seen[-1]["predicted"] == pytest.approx(seen[-1]["observed"], rel=EXACT)

    def flat(value):
        return torch.cat([value(optimizer.state[p]).flatten() for p in net.parameters()])

    if adam:
        P = 1 / (flat(lambda s: s["exp_avg_sq"] / (1 - 0.9**12)).sqrt() + 1e-8)
        moving = P * flat(lambda s: s["exp_avg"])
    else:
        P = 1 / (flat(lambda s: s["square_avg"]).sqrt() + 1e-8)
        moving = flat(lambda s: s["momentum_buffer"])
    J = jacobian(net, x)
    A, v, f = J @ (P[:, None] * J.T), J @ moving, net(x).detach().flatten()
    for t in range(12, 20):
        leaf = f.reshape(-1, 3).clone().requires_grad_()
        (q,) = torch.autograd.grad(F.cross_entropy(leaf[PROBE:], y[PROBE:]), leaf)
        v = beta * v + (1 - beta if adam else 1) * A @ q.flatten()
        f = f - lr * v / (1 - beta ** (t + 1) if adam else 1)
        tracker.advance()
    expected = float(F.cross_entropy(f.reshape(-1, 3)[:PROBE], y[:PROBE]))
    assert tracker.initial.loss == pytest.approx(expected, rel=EXACT)


def test_what_the_prediction_leaves_out_is_named():
    net = linear()
    assert tracked(net, SGD(net.parameters(), 0.1)).leaves_out == ""
    assert tracked(net, SGD(net.parameters(), 0.1, weight_decay=0.1)).leaves_out == "weight decay"


def test_without_time_the_pool_is_cut():
    net = linear()
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
    tracker = tracked(net, optimizer, seconds=0.0)
    seen = train(net, optimizer, tracker, 5)
    assert tracker.initial.part.samples == 2
    assert tracker.initial.kernels.shape == (1, 4, 4), "two of the probe, two of the pool"
    assert all(math.isfinite(s["predicted"]) for s in seen)


@pytest.mark.parametrize("first", [6, 12])
def test_the_first_samples_of_the_pool_stand_for_all(first):
    """Exact where the others are copies of them."""
    net, (x, y) = linear(), data()
    loss, some = nn.CrossEntropyLoss(), slice(PROBE, PROBE + first)
    inputs, labels = x[some].repeat(24 // first, 1), y[some].repeat(24 // first)
    optimizer = grouped(net, momentum=0.9)
    pool = ProbedNetwork(net, inputs, lambda outputs: loss(outputs, labels))
    tracker = LossTracker(
        ProbedNetwork(net, x[:PROBE], lambda outputs: loss(outputs, y[:PROBE])), OptimizerView(optimizer, net),
        KernelPrediction(), LossCurves(), pool=pool, every_n_steps=1,
    )  # fmt: skip
    sizes = tracker._affordable._sizes
    tracker._affordable._sizes = [size for size in sizes if size.samples == first and size.exact]
    assert [size.samples for size in sizes if size.exact] == [6, 12, 24]
    tracker.observe(0)
    for _ in range(20):
        optimizer.zero_grad()
        loss(net(inputs), labels).backward()
        tracker.advance()
        optimizer.step()
    values = tracker.observe(20)
    assert values["predicted"] == pytest.approx(values["observed"], rel=EXACT)
