"""Networks, data and real training that the tests of the dynamics share."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_graphon.dynamics import LossDecayPredictor
from lightning_graphon.ntk import empirical_ntk
from tests.helpers.ntk_oracles import FIXTURES


def digits(n, skip=0):
    import numpy as np

    z = np.load(FIXTURES / "inputs.npz")
    x, y = torch.from_numpy(z["x_train_u8"] / 16.0), torch.from_numpy(z["y_train"]).long()
    return x[skip : skip + n], y[skip : skip + n]


def half_mse(f, y):
    return 0.5 * F.mse_loss(f, y)


def wide_network(width=4096, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).double()


def predictor_of(model, x, y, loss_fn, *, reduce=None, test=None, **options):
    """Predictor with the network's own kernel, and test points (x, y) if given."""
    if test is not None:
        options |= {
            "test_kernel": empirical_ntk(model, test[0], x2=x, reduce=reduce),
            "test_outputs": model(test[0]).detach(),
            "test_targets": test[1],
        }
    return LossDecayPredictor(empirical_ntk(model, x, reduce=reduce), model(x).detach(), y, loss_fn, **options)


def train(model, x, y, loss_fn, lrs, *, test=None, **sgd):
    """Full-batch SGD: losses [T + 1] of the train points and, with `test`, of the test points."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lrs[0], **sgd)
    losses, held_out = [], []
    for lr in [*lrs, None]:
        loss = loss_fn(model(x), y)
        losses.append(float(loss.detach()))
        if test is not None:
            held_out.append(float(loss_fn(model(test[0]), test[1]).detach()))
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    first = torch.tensor(losses, dtype=torch.float64)
    return (first, torch.tensor(held_out, dtype=torch.float64)) if test is not None else first


def error(predicted, observed):
    """Largest relative error."""
    return float(((predicted - observed).abs() / observed).max())
