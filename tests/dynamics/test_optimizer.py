"""What optimizers do, against one real step of each on a model that is linear in its parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop

from lightning_graphon.dynamics import (
    LossDecayPredictor,
    OptimizerStep,
    OptimizerView,
    optimizer_preconditioner,
    read_optimizer_step,
)
from lightning_graphon.ntk import empirical_ntk

# Without running means of gradients, so that a step is P times the gradient of that very step.
ADAPTIVE = {
    "adam": lambda p: Adam(p, lr=0.03, betas=(0.0, 0.9)),
    "amsgrad": lambda p: Adam(p, lr=0.03, betas=(0.0, 0.5), amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.03, betas=(0.0, 0.9), weight_decay=0.0),
    "adamw amsgrad": lambda p: AdamW(p, lr=0.03, betas=(0.0, 0.9), weight_decay=0.0, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.03, alpha=0.9),
    "centered": lambda p: RMSprop(p, lr=0.03, alpha=0.9, centered=True),
    "large eps": lambda p: Adam(p, lr=0.03, betas=(0.0, 0.9), eps=0.3),
}


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    model = nn.Linear(5, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 5, generator=generator, dtype=torch.float64))
        model.bias.zero_()
    return model, x, torch.arange(12) % 3


def step(model, x, y, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", ADAPTIVE)
def test_one_real_step_is_the_predicted_one(name):
    model, x, y = problem()
    optimizer = ADAPTIVE[name](model.parameters())
    for _ in range(5):
        step(model, x, y, optimizer)
    before = model(x).detach()
    step(model, x, y, optimizer)
    diagonal = optimizer_preconditioner(optimizer, model)
    assert {n: p.shape for n, p in diagonal.items()} == {n: p.shape for n, p in model.named_parameters()}
    kernel = empirical_ntk(model, x, reduce=None, preconditioner=diagonal)
    predictor = LossDecayPredictor(kernel, before, y, F.cross_entropy)
    predictor.step(read_optimizer_step(optimizer).rates[0])
    torch.testing.assert_close(predictor.outputs, model(x).detach())  # float64
    assert predictor.loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-12)


def test_sgd_needs_none():
    model, x, y = problem()
    optimizer = SGD(model.parameters(), lr=0.1)
    assert optimizer_preconditioner(optimizer, model) == {}
    step(model, x, y, optimizer)
    assert optimizer_preconditioner(optimizer, model) == {}


@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop])
def test_no_state_yet(kind):
    model, _, _ = problem()
    with pytest.raises(ValueError, match=f"{kind.__name__} has no state yet"):
        optimizer_preconditioner(kind(model.parameters(), lr=0.1), model)


def test_parameters_that_do_not_move():
    """Left out of the optimizer, frozen, or never in the graph: their entries are 0, and frozen ones are not named."""
    model, x, y = problem()
    whole = nn.ModuleDict({"used": model, "unused": nn.Linear(2, 2), "left": nn.Linear(5, 3, dtype=torch.float64)})
    whole["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    optimizer = Adam([*model.parameters(), *whole["unused"].parameters()], lr=0.1)
    F.cross_entropy(model(x) + whole["left"](x), y).backward()
    optimizer.step()
    diagonal = optimizer_preconditioner(optimizer, whole)
    assert {name.split(".")[0] for name in diagonal} == {"used", "unused", "left"}
    assert all(bool((value > 0).all()) == name.startswith("used") for name, value in diagonal.items())
    assert all(bool((value == 0).all()) for name, value in diagonal.items() if not name.startswith("used"))


def test_groups_with_their_own_eps_and_betas():
    model, x, y = problem()
    groups = [{"params": [model.weight], "betas": (0.9, 0.5)}, {"params": [model.bias], "eps": 10.0}]
    optimizer = Adam(groups, lr=0.1)
    step(model, x, y, optimizer)
    diagonal = optimizer_preconditioner(optimizer, model)
    # After one step Adam's corrected second moment is the squared gradient, whatever β2.
    torch.testing.assert_close(diagonal["weight"], 1 / (model.weight.grad.abs() + 1e-8))
    torch.testing.assert_close(diagonal["bias"], 1 / (model.bias.grad.abs() + 10))


def test_reading():
    weight, bias = (torch.zeros(2, requires_grad=True) for _ in range(2))
    groups = [{"params": [weight], "lr": 0.5}, {"params": [bias]}]
    assert read_optimizer_step(SGD(groups, lr=0.1, momentum=0.9, nesterov=True)) == OptimizerStep((0.5, 0.1), 0.9, True)
    assert read_optimizer_step(SGD([weight], lr=0.1, momentum=0.9, dampening=0.2)) == OptimizerStep(
        (0.1,), 0.9, False, 0.2
    )
    assert read_optimizer_step(AdamW([weight], lr=0.1, betas=(0.8, 0.9))) == OptimizerStep(
        (0.1,), 0.8, False, 0.8, True
    )
    assert read_optimizer_step(RMSprop([weight], lr=0.1, momentum=0.3)) == OptimizerStep((0.1,), 0.3, adaptive=True)


@pytest.mark.parametrize("kind", [Adagrad, NAdam])
def test_unknown_optimizers(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot be told in function space; SGD, Adam"):
        read_optimizer_step(kind([torch.zeros(2, requires_grad=True)], lr=0.1))


def test_subclasses_are_what_they_inherit():
    class Mine(SGD):
        pass

    assert read_optimizer_step(Mine([torch.zeros(2, requires_grad=True)], lr=0.1)).rates == (0.1,)


@pytest.mark.parametrize("kind", [SGD, Adam, RMSprop])
def test_climbing(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(maximize=True\) climbs"):
        read_optimizer_step(kind([torch.zeros(2, requires_grad=True)], lr=0.1, maximize=True))


def test_groups_with_different_momentum():
    a, b = (torch.zeros(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="different momentum"):
        read_optimizer_step(SGD([{"params": [a], "momentum": 0.9}, {"params": [b]}], lr=0.1))


@pytest.mark.parametrize("kind", [Adam, RMSprop])
def test_entries_without_a_gradient_do_not_move(kind):
    """An input that is always zero: its weights have a state of zeros, and one over eps would be 1e8."""
    model, x, y = problem()
    x[:, 2] = 0
    optimizer = kind(model.parameters(), lr=0.1)
    step(model, x, y, optimizer)
    diagonal = optimizer_preconditioner(optimizer, model)["weight"]
    assert bool((diagonal[:, 2] == 0).all())
    assert bool((diagonal[:, [0, 1, 3, 4]] > 0).all())


@pytest.mark.parametrize("kind", [Adam, RMSprop])
def test_biases_in_front_of_a_batch_norm_do_not_move(kind):
    """It takes away what they add: their gradient is rounding, and divided by itself it is large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    optimizer = kind(model.parameters(), lr=1e-3)
    for _ in range(3):
        step(model, torch.randn(12, 5), torch.arange(12) % 3, optimizer)
    diagonal, view = optimizer_preconditioner(optimizer, model), OptimizerView(optimizer, model).diagonal()
    assert float(diagonal["0.bias"].min()) > 1e3 * float(diagonal["0.weight"].max())
    assert bool((view.pop("0.bias") == 0).all())
    assert all(torch.equal(part, diagonal[name]) for name, part in view.items())


def test_biases_of_units_that_are_nearly_dead_do_move():
    model, x, y = problem()
    model = nn.Sequential(model, nn.Linear(3, 3).double())
    model[1].weight.data[:, 0] *= 1e-5  # its gradients, of weights and bias, are as much smaller
    optimizer = Adam(model.parameters(), lr=0.1)
    step(model, x, y, optimizer)
    diagonal = optimizer_preconditioner(optimizer, model)
    assert float(diagonal["0.bias"][0]) > 1e3 * float(diagonal["0.bias"][1:].max())
    assert torch.equal(OptimizerView(optimizer, model).diagonal()["0.bias"], diagonal["0.bias"])
