"""A rehearsal on the very batches that training sees is the training itself, to the last bit."""

import math

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from tests.helpers.kinds import KINDS
from tests.helpers.modules import Classifier, loader, mlp
from tests.helpers.rehearsal_cases import CASES, Case, Cosine, OneCycle, ReadsTrainer, Rehearses, adam, fit


@pytest.mark.parametrize("name", CASES)
def test_on_the_true_batches_it_is_the_training(name, tmp_path):
    case, callback = CASES[name], Rehearses(CASES[name].steps)
    fit(case, callback, logger=CSVLogger(tmp_path))
    rehearsed, observed = callback.compare()
    assert len(observed) >= 4
    assert rehearsed == observed
    assert len(set(observed)) > 2, "nothing was trained"


@pytest.mark.parametrize("name", KINDS)
def test_of_every_kind_of_module(name, tmp_path):
    kind, callback = KINDS[name], Rehearses(2)
    fit(Case(kind.build, kind.data), callback, logger=CSVLogger(tmp_path))
    rehearsed, observed = callback.compare()
    assert len(observed) >= 2  # a GAN takes two steps with each batch
    assert rehearsed == observed


@pytest.mark.parametrize("at", [1, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "name",
    ["adam", "one cycle", "epoch schedule", "batch norm", "scaler", "pruned, sgd", "metrics", "hooks", "reads trainer"],
)
def test_from_the_middle_of_a_fit(name, at, tmp_path):
    """Inside an epoch and at the end of one: states of optimizers and schedulers go on."""
    callback = Rehearses(4, at=at)
    fit(CASES[name], callback, logger=CSVLogger(tmp_path), max_epochs=4)
    rehearsed, observed = callback.compare()
    assert len(observed) == 5
    assert rehearsed == observed


class Leaves(Callback):
    """Saves a checkpoint and stops."""

    def __init__(self, at, path):
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize("build", [OneCycle, Cosine, ReadsTrainer])
@pytest.mark.parametrize("at", [6, 8])
def test_after_a_resume(build, at, tmp_path):
    case = Case(build, trainer={"max_epochs": 5})
    fit(case, Leaves(at, tmp_path / "last.ckpt"))
    callback = Rehearses(5, at=at)
    fit(case, callback, ckpt_path=tmp_path / "last.ckpt")
    rehearsed, observed = callback.compare()
    assert len(observed) == 6
    assert rehearsed == observed


def test_accumulation_is_gone_on_with():
    """A rehearsal that begins between two batches of one step has the gradient of the first."""
    case = Case(trainer={"accumulate_grad_batches": 3, "limit_train_batches": 6, "max_epochs": 2})

    class Between(Rehearses):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1 and self.rehearsed is None:
                self.rehearse(trainer, pl_module)
            else:
                super().on_train_batch_end(trainer, pl_module)

    callback = Between(3, at=-1)
    callback.at = 0
    callback.on_train_start = lambda *args: None
    fit(case, callback)
    rehearsed, observed = callback.compare()
    assert rehearsed == observed
    assert len(observed) == 4


def test_on_the_pool_it_is_close():
    """Another order of other samples of the same kind: the loss falls about as far."""
    case = Case(
        lambda: Classifier(mlp, adam), data=lambda: loader(960, shuffle=True), trainer={"limit_train_batches": 40}
    )
    callback = Rehearses(40, true_batches=False)
    fit(case, callback)
    rehearsed, observed = callback.compare()
    assert rehearsed[0] == observed[0]
    assert rehearsed[-1] < 0.7 * rehearsed[0]
    assert math.isclose(rehearsed[-1], observed[-1], rel_tol=0.25)  # two orders of batches of 16 differ by about 10 %
