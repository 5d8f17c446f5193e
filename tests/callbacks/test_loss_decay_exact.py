"""The exact oracle of `LossDecayMonitor`: a model linear in its parameters, trained on all of its probe.

Its kernel does not move and its probe is not finite, so the prediction is what training does, to rounding.
"""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_graphon.callbacks import KernelPrediction, LossDecayMonitor
from tests.helpers.modules import Classifier, digits, loader, make_trainer

# Training rounds in single precision, the prediction in double: some 1e-7 a step.
SINGLE = 1e-5
STEPS = 30


def linear():
    return nn.Linear(64, 10)


def monitor(**kwargs):
    defaults = {
        "predict": "kernel", "probe_size": 96, "every_n_steps": 3, "figure": False, "verbose": False,
        "raise_errors": True,
    }  # fmt: skip
    return LossDecayMonitor(**{**defaults, **kwargs})


class Scheduled(Classifier):
    """A linear classifier with an optimizer of parameter groups and a scheduler that moves at every step."""

    def __init__(self, optimizer, scheduler=None, loss=F.cross_entropy, net=linear):
        super().__init__(net, optimizer)
        self.make_scheduler, self.loss = scheduler, loss

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self)
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


def one_group(**kwargs):
    return lambda model: SGD(model.parameters(), **{"lr": 0.5, **kwargs})


def two_groups(weight, bias, **kwargs):
    return lambda m: SGD([{"params": m.net.weight, "lr": weight}, {"params": m.net.bias, "lr": bias}], lr=0.1, **kwargs)


def fit(model, watch, *callbacks, batch_size=96, steps=STEPS, **kwargs):
    trainer = make_trainer(
        watch, *callbacks, max_epochs=-1, max_steps=steps, limit_train_batches=1.0, log_every_n_steps=1, **kwargs
    )
    trainer.fit(model, loader(batch_size=batch_size))
    assert trainer.global_step == steps
    return trainer


def check(watch, steps=STEPS, name="predicted", start=0):
    """The prediction is the observed loss at every step where there is one, and the loss fell."""
    curves = watch.curves
    assert curves["step"].tolist() == [float(k) for k in range(0, steps + 1, 3)]
    here = curves["step"] >= start
    predicted, observed = curves[name][here], curves["observed"][here]
    assert len(predicted) > 3
    torch.testing.assert_close(predicted, observed, rtol=SINGLE, atol=0)
    assert observed[-1] < 0.9 * observed[0], "a loss that stands still is easy to predict"
    assert watch.invalid_from is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.2, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.9, "dampening": 0.3},
        {"lr": 0.2, "momentum": 0.9, "nesterov": True},
    ],
    ids=["sgd", "momentum", "dampening", "nesterov"],
)
def test_sgd(options):
    watch = monitor()
    fit(Scheduled(one_group(**options)), watch)
    check(watch)


def mse(outputs, y):
    return F.mse_loss(outputs, F.one_hot(y, 10).to(outputs))


def bce(outputs, y):
    return F.binary_cross_entropy_with_logits(outputs, F.one_hot(y, 10).to(outputs), reduction="sum") / len(y)


def summed(outputs, y):
    return F.cross_entropy(outputs, y, reduction="sum")


@pytest.mark.parametrize("optimizer", [one_group(lr=0.005), one_group(lr=0.002, momentum=0.9)])
def test_losses_summed_over_the_batch(optimizer):
    """With minibatches that are the same 24 samples four times over, a sum's gradient is a quarter of the probe's."""
    x, y = digits(24)
    data = DataLoader(TensorDataset(x.repeat(4, 1), y.repeat(4)), batch_size=24)
    watch = monitor()
    trainer = make_trainer(watch, max_epochs=-1, max_steps=STEPS, limit_train_batches=1.0)
    trainer.fit(Scheduled(optimizer, loss=summed), data)
    check(watch)


@pytest.mark.parametrize("limit", [1, 0.5], ids=["int", "float"])
def test_samples_that_training_never_sees_are_no_part_of_the_probe_nor_of_its_data(limit):
    """In order, the first batch of two is all there is: a probe of it is the whole training set again."""
    watch = monitor()
    trainer = make_trainer(watch, max_epochs=-1, max_steps=STEPS, limit_train_batches=limit)
    trainer.fit(Scheduled(one_group()), loader(batch_size=48))
    check(watch)
    assert watch._session.tracker.network.count == 48
    assert watch._session.tracker.pool is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"limit_train_batches": 1}, 96), ({"limit_train_batches": 0.5}, 96), ({"overfit_batches": 1}, 24)],
    ids=str,
)
def test_shuffled_epochs_of_a_few_batches_see_all_the_data_in_time(options, expected):
    """Unless they are overfitted: Lightning takes the same batches again then."""
    watch = monitor(probe_size=24)
    trainer = make_trainer(watch, max_epochs=1, **{"limit_train_batches": 1.0, **options})
    trainer.fit(Scheduled(one_group()), loader(batch_size=24, shuffle=True))
    pool = watch._session.tracker.pool
    assert watch._session.tracker.network.count + (pool.count if pool else 0) == expected


def test_the_full_kernel():
    watch = monitor(kernel=KernelPrediction(full=True))
    fit(Scheduled(one_group()), watch)
    check(watch)
    assert watch._session.tracker.initial.kernels.shape[1:] == (96, 10, 96, 10)


def mixed():
    """Linear in its parameters, and every output moves with every other: the layer on top stands still."""
    return nn.Sequential(nn.Linear(64, 10), nn.Linear(10, 10).requires_grad_(False))


@pytest.mark.parametrize("loss", [F.cross_entropy, mse])
@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.5, 0.05)], ids=str)
def test_outputs_that_mix(rates, loss):
    def optimizer(module):
        weight, bias = module.net[0].parameters()
        return SGD([{"params": weight, "lr": rates[0]}, {"params": bias, "lr": rates[1]}], momentum=0.9)

    watch = monitor()
    fit(Scheduled(optimizer, loss=loss, net=mixed), watch)
    check(watch)


@pytest.mark.parametrize("loss", [mse, bce])
def test_other_losses(loss):
    watch = monitor()
    fit(Scheduled(one_group(momentum=0.5), loss=loss), watch)
    check(watch)


SCHEDULES = {
    "cosine": lambda o: CosineAnnealingLR(o, T_max=STEPS),
    "warm-up from 0": lambda o: LambdaLR(o, lambda step: min(1.0, step / 8)),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.5, total_steps=STEPS + 1),  # moves the momentum, too
    "goes on and off": lambda o: LambdaLR(o, lambda step: float(step % 4 > 0)),
}


# One cycle moves the momentum, too, of an optimizer that has one.
@pytest.mark.parametrize(
    ("schedule", "momentum"), [(s, mu) for s in SCHEDULES for mu in (0.0, 0.9) if mu or s != "one cycle"]
)
def test_schedules(schedule, momentum):
    watch = monitor()
    fit(Scheduled(one_group(momentum=momentum), SCHEDULES[schedule]), watch)
    check(watch)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_accumulated_batches(momentum):
    watch = monitor()
    fit(Scheduled(one_group(momentum=momentum)), watch, batch_size=48, accumulate_grad_batches=2)
    check(watch)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rates", [(0.3, 0.03), (0.03, 0.3), (0.3, 0.0), (0.3, 0.3)], ids=str)
def test_groups_with_their_own_rates(rates, momentum):
    watch = monitor()
    fit(Scheduled(two_groups(*rates, momentum=momentum)), watch)
    check(watch)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_groups_whose_ratio_changes(momentum):
    watch = monitor()

    def schedule(optimizer):
        return LambdaLR(optimizer, [lambda step: 1.0, lambda step: 1.0 if step < 10 else 20.0])

    fit(Scheduled(two_groups(0.3, 0.03, momentum=momentum), schedule), watch)
    check(watch)


def test_groups_that_warm_up_from_zero():
    watch = monitor()
    fit(Scheduled(two_groups(0.3, 0.03), SCHEDULES["warm-up from 0"]), watch)
    check(watch)


def test_by_hand():
    class ByHand(Classifier):
        def __init__(self):
            super().__init__(linear, one_group(momentum=0.9, lr=0.2))
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(x), y))
            optimizer.step()

        def configure_optimizers(self):
            return self.make_optimizer(self)

    watch = monitor()
    fit(ByHand(), watch)
    check(watch)


@pytest.mark.parametrize("options", [{}, {"lr": 0.2, "momentum": 0.9}], ids=["sgd", "momentum"])
def test_refreshed(options):
    watch = monitor(kernel=KernelPrediction(refresh_every_n_steps=6))
    fit(Scheduled(one_group(**options)), watch)
    check(watch)
    assert watch.curves["refreshed"][:3].isnan().tolist() == [True, True, True], "none before the first refresh, at 6"
    check(watch, name="refreshed", start=9)


def test_a_later_start():
    watch = monitor(kernel=KernelPrediction(start_step=7))
    fit(Scheduled(one_group()), watch)
    curves = watch.curves
    assert curves["step"].tolist() == [0.0, 3.0, 6.0, 7.0, *(float(k) for k in range(9, STEPS + 1, 3))]
    assert curves["predicted"].isnan().tolist() == [k < 7 for k in curves["step"]]
    there = curves["step"] >= 7
    torch.testing.assert_close(curves["predicted"][there], curves["observed"][there], rtol=SINGLE, atol=0)


def test_observed_is_the_loss_of_the_probe_by_hand():
    x, y = digits()
    by_hand = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            self.on_train_batch_end(trainer, pl_module)

        def on_train_batch_end(self, trainer, pl_module, *args):
            with torch.no_grad():
                by_hand[trainer.global_step] = float(
                    F.cross_entropy(x.double() @ pl_module.net.weight.double().T + pl_module.net.bias.double(), y)
                )

    watch = monitor()
    fit(Scheduled(one_group()), watch, Look())
    expected = torch.tensor([by_hand[int(k)] for k in watch.curves["step"]], dtype=torch.float64)
    torch.testing.assert_close(watch.curves["observed"], expected, rtol=1e-6, atol=0)  # outputs in single precision
