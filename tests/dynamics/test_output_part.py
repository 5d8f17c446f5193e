"""Part of the outputs stands for all of them."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_graphon.dynamics import KernelPrediction, LossCurves, LossTracker, OptimizerView, ProbedNetwork
from lightning_graphon.dynamics.output_part import OutputPart, PartLoss, output_positions
from lightning_graphon.dynamics.recorded_loss import recorded_loss

N, T, V = 12, 6, 5


def targets(*shape, most=V):
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(1))


def padded(*shape):
    """The first sample is all padding, which has no gradient."""
    y = targets(*shape)
    y[0] = -1
    return y.flatten()


LOSSES = {
    "words last": (lambda o: F.cross_entropy(o.flatten(0, 1), targets(N, T).flatten()), (N, T, V), (T, V)),
    "classes first": (lambda o: F.cross_entropy(o, targets(N, 4, 3)), (N, V, 4, 3), (12, V)),
    "pixels": (lambda o: F.mse_loss(o, torch.ones_like(o)), (N, 1, 4, 3), (12, 1)),
    "absolute error": (lambda o: F.l1_loss(o, torch.full_like(o, 9.0)), (N, 4, 3), (12, 1)),
    "classes of a sample": (lambda o: F.cross_entropy(o, targets(N)), (N, V), (1, V)),
    "all of a sample": (lambda o: F.cross_entropy(o.flatten(1), targets(N)), (N, 4, 3), (1, 12)),
    "padded": (
        lambda o: F.cross_entropy(o.flatten(0, 1), padded(N, T), ignore_index=-1),
        (N, T, V), (T, V),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_coupled_numbers_are_found(name):
    loss, shape, expected = LOSSES[name]
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    places = output_positions(loss, outputs)
    assert places.shape == expected
    assert places.flatten().sort().values.tolist() == list(range(math.prod(shape[1:])))


def test_all_parts_together_are_the_whole():
    """The estimate is unbiased: its mean over parts that cover everything once is the loss itself, to first order."""
    y, shape = targets(N, T).flatten(), (N, T, V)

    def loss(outputs):
        return F.cross_entropy(outputs.flatten(0, 1), y)

    start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = start + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    network = ProbedNetwork(nn.Linear(V, V).double(), start, loss)
    recording = recorded_loss(network, start)
    places = output_positions(recording, start)
    estimates, gradients = [], []
    for position in places:
        part = OutputPart(N, position[None])
        of_part = PartLoss(recording, start, part)
        estimates.append(of_part(part.rows(moved)))
        gradients.append(of_part.value_and_gradient(part.rows(start))[1])
        torch.testing.assert_close(of_part(part.rows(start)), recording(start))
    # The loss is a mean over positions, so only the mean of the estimates must be right, and is exactly.
    torch.testing.assert_close(torch.stack(estimates).mean(), recording(moved))
    whole = recording.value_and_gradient(start)[1]
    torch.testing.assert_close(torch.stack(gradients, 1).reshape(shape) / T, whole)


class Tokens(nn.Module):
    """A small language model whose tokens see each other."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(V, 32), nn.Linear(T, T), nn.Linear(32, V)

    def forward(self, x):
        h = self.embed(x)
        return self.out(torch.tanh(h + self.mix(h.mT).mT))


def trained(seconds, steps=40, probe=48):
    """Predicted and observed loss of a tracker that follows SGD."""
    torch.manual_seed(0)
    net = Tokens()
    x, y = targets(probe, T), targets(probe, T).roll(1, 0)

    def loss(outputs):
        return F.cross_entropy(outputs.flatten(0, 1), y.flatten())

    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    network, curves = ProbedNetwork(net, x, loss), LossCurves()
    tracker = LossTracker(
        network, OptimizerView(optimizer, net, True), KernelPrediction(), curves, every_n_steps=10,
        seconds=lambda: seconds,
    )  # fmt: skip
    tracker.observe(0)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(net(x)).backward()
        tracker.advance()
        optimizer.step()
        if step % 10 == 0:
            tracker.observe(step)
    return tracker, curves.tensors()


@pytest.mark.parametrize("probe", [48, 600])
def test_a_part_predicts_what_training_does(probe):
    """600 samples of 30 outputs are too many for the full kernel: the largest part is taken, of 1024 rows at most."""
    tracker, curves = trained(math.inf, probe=probe)
    assert (tracker.initial.part is None) == (probe == 48)
    fall = curves["observed"][0] - curves["observed"][-1]
    assert fall > 0.02
    # The kernel of tokens, averaged over words, and constant: within 15 % of the fall in either case (here 4 and 9).
    assert abs(curves["predicted"][-1] - curves["observed"][-1]) < 0.15 * fall


def test_without_time_the_smallest_part_is_taken_and_says_something():
    tracker, curves = trained(0.0)
    assert tracker.initial.part.samples == 2
    assert curves["predicted"].isfinite().all()
    assert curves["predicted"][-1] < curves["predicted"][0]


def test_a_part_goes_on_from_its_state():
    tracker, _ = trained(0.0)
    again = trained(0.0, steps=0)[0]
    again.load_state_dict(tracker.state_dict())
    assert again.initial.loss == tracker.initial.loss
    assert again.initial.part.entries.equal(tracker.initial.part.entries)
