"""Any LightningModule, any batch: the loss is that of training_step, whatever it does beside."""

import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_graphon.callbacks import LossDecayMonitor, PruneAtInit
from tests.helpers.modules import (
    DATA_METHODS,
    METHODS,
    Autoencoder,
    Classifier,
    Gan,
    Probe,
    digits,
    disagreement,
    loader,
    make_trainer,
    pruned_max,
    quiet,
)


@pytest.fixture(scope="module")
def reference():
    """The masks of the plain classifier, by method."""

    def masks(method):
        pruner = quiet(method)
        make_trainer(pruner).fit(Classifier(), loader())
        return pruner.masks

    return {method: masks(method) for method in DATA_METHODS}


class Logs(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"twice": 2 * loss, "epoch": float(self.current_epoch)})
        self.logger.experiment.add_scalar("direct", loss, self.global_step)
        self.logger.log_metrics({"hand": loss.item()}, step=self.global_step)
        for logger in self.loggers:
            logger.log_metrics({"each": 1.0})
        self.print("hello")
        return loss


class UsesTrainer(Classifier):
    def training_step(self, batch, batch_idx):
        assert self.trainer.training
        assert batch_idx in range(4)
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        self.log("sched", self.lr_schedulers().get_last_lr()[0])
        return super().training_step(batch, batch_idx) * (self.trainer.max_epochs / 1)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class ReturnsDict(Classifier):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "extra": batch[0].mean()}


class OneArgument(Classifier):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class OtherNames(Classifier):
    def training_step(self, minibatch, i):
        return super().training_step(minibatch, i)


class StaysInEval(Classifier):
    def training_step(self, batch, batch_idx):
        self.net.eval()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("method", DATA_METHODS)
@pytest.mark.parametrize("kind", [Logs, UsesTrainer, ReturnsDict, OneArgument, OtherNames, StaysInEval])
def test_training_steps_of_every_sort(kind, method, reference, tmp_path):
    pruner = quiet(method)
    trainer = make_trainer(pruner, logger=TensorBoardLogger(tmp_path) if kind is Logs else False, log_every_n_steps=1)
    model = kind()
    trainer.fit(model, loader())
    assert pruner.masks == reference[method]
    assert trainer.global_step == 3
    assert pruned_max(model, pruner.masks) == 0.0


def test_scoring_writes_nothing_to_the_loggers(tmp_path):
    class Counting(CSVLogger):
        written = 0

        def log_metrics(self, metrics, step=None):
            self.written += "hand" in metrics
            super().log_metrics(metrics, step)

    class Hand(Classifier):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"hand": 1.0}, step=self.global_step)
            return super().training_step(batch, batch_idx)

    logger = Counting(tmp_path)
    trainer = make_trainer(quiet("snip"), logger=logger)
    trainer.fit(Hand(), loader())
    assert logger.written == 3
    assert trainer.logger is logger


class Dicts(Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, i):
        x, y = digits()
        return {"image": x[i], "meta": {"label": y[i], "name": f"digit {i}"}}


class FromDict(Classifier):
    def training_step(self, batch, batch_idx):
        assert batch["meta"]["name"][0].startswith("digit")
        return F.cross_entropy(self(batch["image"]), batch["meta"]["label"])


class FromNested(Classifier):
    def training_step(self, batch, batch_idx):
        (x, (y,)), index = batch
        assert len(index) == len(y)
        return F.cross_entropy(self(x), y)


class Nested(Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, i):
        x, y = digits()
        return (x[i], (y[i],)), i


class FromCombined(Classifier):
    def training_step(self, batch, batch_idx):
        return (super().training_step(batch["a"], 0) + super().training_step(batch["b"], 0)) / 2


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*digits(), strict=True)


BATCHES = {
    "dict": (FromDict, lambda: DataLoader(Dicts(), 16)),
    "nested": (FromNested, lambda: DataLoader(Nested(), 16)),
    "dict of loaders": (FromCombined, lambda: {"a": loader(), "b": loader()}),
    "combined loader": (FromCombined, lambda: CombinedLoader({"a": loader(), "b": loader()}, "min_size")),
    "iterable dataset": (Classifier, lambda: DataLoader(Stream(), 16)),
}


@pytest.mark.parametrize("method", DATA_METHODS)
@pytest.mark.parametrize("kind", BATCHES, ids=[k.replace(" ", "-") for k in BATCHES])
def test_batches_of_every_sort(kind, method, reference):
    module, data = BATCHES[kind]
    pruner = quiet(method)
    model = module()
    trainer = make_trainer(pruner)
    trainer.fit(model, data())
    assert pruner.masks == reference[method]
    assert trainer.global_step == 3


@pytest.mark.parametrize("method", METHODS)
def test_single_tensor_batches_of_an_autoencoder(method):
    pruner, model = quiet(method, 0.8), Autoencoder()
    make_trainer(pruner).fit(model, loader())
    assert list(pruner.masks) == ["encoder.0.weight", "encoder.2.weight", "decoder.0.weight", "decoder.2.weight"]
    assert pruner.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    assert all(int(mask.sum()) > 0 for mask in pruner.masks.values())
    assert pruned_max(model, pruner.masks) == 0.0


def test_datamodule_with_transfer_hooks(reference):
    class Data(pl.LightningDataModule):
        """Hands out raw integers; the hooks turn them into images on the way to the device."""

        def train_dataloader(self):
            return DataLoader([((x * 16).to(torch.uint8), y) for x, y in zip(*digits(), strict=True)], 16)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0].float(), batch[1]

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            assert batch[0].dtype == torch.float32
            return [b.to(device) for b in batch]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] / 16, batch[1]]

    pruner = quiet("snip")
    make_trainer(pruner).fit(Classifier(), datamodule=Data())
    assert pruner.masks == reference["snip"]


@pytest.mark.parametrize("method", DATA_METHODS)
def test_loss_fn_in_place_of_training_step(method, reference):
    class Odd(Classifier):
        def training_step(self, batch, batch_idx):
            if not self.trainer.fit_loop.epoch_loop.batch_progress.total.ready:
                raise AssertionError("scoring must not call training_step")
            return super().training_step(batch, batch_idx)

    def loss_fn(module, batch):
        x, y = batch
        return F.cross_entropy(module(x), y)

    pruner = quiet(method, loss_fn=loss_fn)
    make_trainer(pruner).fit(Odd(), loader())
    assert pruner.masks == reference[method]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes of errors are new in 3.11")
def test_an_error_of_the_users_function_says_who_called_it():
    class Late(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            self.scale = 2.0

        def training_step(self, batch, batch_idx):
            return self.scale * super().training_step(batch, batch_idx)

    with pytest.raises(AttributeError, match="scale") as caught:
        make_trainer(quiet("snip")).fit(Late(), loader())
    assert "before the first batch" in caught.value.__notes__[0]
    with pytest.raises(TypeError) as caught:
        make_trainer(quiet("snip", loss_fn=F.cross_entropy)).fit(Classifier(), loader())
    assert "as loss_fn(pl_module, batch)" in caught.value.__notes__[0]


@pytest.mark.parametrize("method", DATA_METHODS)
def test_given_batches_in_place_of_the_train_dataloader(method, reference):
    pruner = quiet(method, batches=[batch for batch, _ in zip(loader(), range(4), strict=False)])
    make_trainer(pruner).fit(Classifier(), loader(shuffle=True))
    assert pruner.masks == reference[method]


def test_the_number_of_batches_matters():
    def masks(batches):
        pruner = quiet("snip", batches=batches)
        make_trainer(pruner).fit(Classifier(), loader())
        return pruner.masks

    assert masks(6) == masks(list(loader()))
    assert masks(6) != masks(1)
    assert masks(100) == masks(6), "a dataloader that has fewer batches gives what it has"


@pytest.mark.parametrize("returned", [{"no": 1}, 3.0])
def test_step_without_a_loss_is_a_clear_error(returned):
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return returned

    with pytest.raises(ValueError, match=r"Skips\.training_step returned .* where a loss was expected"):
        make_trainer(quiet("snip")).fit(Skips(), loader())


def test_batches_that_training_skips_are_skipped():
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    batches = list(loader())[:3]
    pruner, without = quiet("snip", batches=batches), quiet("snip", batches=[batches[0], batches[2]])
    with pytest.warns(UserWarning, match=r"Skips\.training_step returned None for scoring batch 1"):
        make_trainer(pruner).fit(Skips(), loader())
    make_trainer(without).fit(Classifier(), loader())
    assert disagreement(pruner.masks, without.masks) < 0.002  # sums of other lengths round otherwise


def test_skipping_every_batch_is_a_clear_error():
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.warns(UserWarning, match="returned None"), pytest.raises(ValueError, match="every score is zero"):
        make_trainer(quiet("snip")).fit(Skips(), loader())


def test_networks_trained_in_turns_by_batch_idx_are_both_scored():
    class Turns(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.odd, self.even = torch.nn.Linear(64, 10), torch.nn.Linear(64, 10)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy((self.odd if batch_idx % 2 else self.even)(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for method in ("snip", "grasp"):
        pruner = quiet(method, 0.9)
        make_trainer(pruner).fit(Turns(), loader())
        assert all(mask.any() for mask in pruner.masks.values())


class MadeLate(Classifier):
    """Its training_step needs what a hook makes."""

    calls = 0

    def start(self):
        type(self).calls += 1
        self.losses = []
        for logger in self.loggers:
            logger.log_metrics({"started": type(self).calls}, 0)

    def training_step(self, batch, batch_idx):
        self.losses.append(super().training_step(batch, batch_idx))
        return self.losses[-1]


def made_in(hook):
    return type("Late", (MadeLate,), {hook: MadeLate.start, "calls": 0})


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
@pytest.mark.parametrize("method", DATA_METHODS)
def test_what_hooks_make_too_late_is_named_and_they_are_not_called_twice(method, hook):
    Late = made_in(hook)
    with pytest.raises(AttributeError, match="losses") as caught:
        make_trainer(quiet(method)).fit(Late(), loader())
    assert Late.calls == 0
    if sys.version_info >= (3, 11):
        assert (
            "before the first batch: make what it needs in __init__, setup or configure_model"
            in (caught.value.__notes__[0])
        )


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_hooks_of_the_module_run_once_where_they_are_in_time(hook, tmp_path):
    class Late(made_in(hook)):
        def setup(self, stage):
            self.losses = []

    # A copy has hooks of its own, which run in a rehearsal.
    monitor = LossDecayMonitor(predict="kernel", probe_size=8, figure=False, verbose=False, raise_errors=True)
    trainer = make_trainer(quiet("snip"), monitor, logger=CSVLogger(tmp_path))
    trainer.fit(Late(), loader())
    assert Late.calls == 1


def test_the_monitor_of_the_loss_comes_after_the_modules_fit_start():
    Late = made_in("on_fit_start")
    monitor = LossDecayMonitor(probe_size=8, figure=False, verbose=False, raise_errors=True)
    make_trainer(monitor).fit(Late(), loader())
    assert Late.calls == 1
    assert len(monitor.curves["observed"]) > 1


def test_manual_step_without_a_loss_is_a_clear_error():
    class Idle(Gan):
        def training_step(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match="manual_backward for no loss"):
        make_trainer(quiet("snip")).fit(Idle(), loader())


def test_loss_that_is_no_number_is_a_clear_error():
    class Nan(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(ValueError, match="loss of scoring batch 0 is nan"):
        make_trainer(quiet("snip")).fit(Nan(), loader())


def test_loss_of_other_things_than_the_weights_is_a_clear_error():
    class Detached(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach().requires_grad_()

    with pytest.raises(ValueError, match="does not depend on the weights"):
        make_trainer(quiet("snip")).fit(Detached(), loader())


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_empty_dataloader_is_a_clear_error(method):
    with pytest.raises(ValueError, match="train dataloader yielded no batch"):
        make_trainer(quiet(method)).fit(Classifier(), DataLoader(Nothing(), 4))


def test_no_training_batches_at_all_is_a_clear_error():
    with pytest.raises(ValueError, match="limit_train_batches is 0"):
        make_trainer(quiet("snip"), limit_train_batches=0).fit(Classifier(), loader())


def test_loaders_are_combined_for_scoring_as_they_are_for_training():
    """With "min_size" training ends with the shorter loader, after two batches: there is no third one to score."""

    def masks(batches, mode):
        prune = quiet("snip", batches=batches)
        make_trainer(prune).fit(FromCombined(), CombinedLoader({"a": loader(), "b": loader(32)}, mode))
        return prune.masks

    assert masks(4, "min_size") == masks(2, "min_size")
    assert masks(4, "max_size_cycle") != masks(2, "max_size_cycle")


def test_dataloader_iter_is_a_clear_error():
    class Draws(Classifier):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return super().training_step(batch, 0)

    with pytest.raises(ValueError, match="dataloader_iter"):
        make_trainer(quiet("snip")).fit(Draws(), loader())
    pruner = quiet("magnitude")
    make_trainer(pruner).fit(Draws(), loader())
    assert pruner.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_arguments_are_checked_when_made():
    with pytest.raises(ValueError, match=r"sparsity .* \[0, 1\)"):
        PruneAtInit("snip", 1.0)
    with pytest.raises(ValueError, match=r"snipp.*Did you mean 'snip'"):
        PruneAtInit("snipp", 0.9)
    with pytest.raises(ValueError, match=r"allocation 'globl'.*Did you mean 'global'"):
        PruneAtInit("snip", 0.9, allocation="globl")
    with pytest.raises(ValueError, match=r"batches .* at least 1"):
        PruneAtInit("snip", 0.9, batches=0)
    with pytest.raises(ValueError, match="schedule"):
        PruneAtInit("snip", 0.9, schedule="cubic")
    with pytest.raises(TypeError, match="absolut"):
        PruneAtInit("grasp", 0.9, options={"absolut": True})
    with pytest.raises(TypeError, match="sparsity"):
        PruneAtInit("snip", "0.9")


def test_pattern_that_matches_nothing_is_an_error_on_fit():
    with pytest.raises(ValueError, match=r"'ned.*' matches no prunable weight"):
        make_trainer(quiet("snip", include="ned.*")).fit(Classifier(), loader())


def test_disagreement_is_a_fraction():
    """The helper that other tests lean on."""
    mask = torch.tensor([True, False, True, True])
    assert disagreement({"a": mask}, {"a": ~mask}) == 1.0
    assert disagreement({"a": mask}, {"a": mask}) == 0.0


class GradientPenalty(Classifier):
    """Takes a gradient inside its training_step, as WGAN-GP and physics-informed networks do."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.clone().requires_grad_()
        logits = self(x)
        (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, y) + 0.1 * grad.square().mean()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_inside_training_step(method):
    pruner = quiet(method)
    model = GradientPenalty()
    make_trainer(pruner).fit(model, loader())
    assert pruned_max(model, pruner.masks) == 0.0


class VarArgs(Classifier):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_training_step_behind_a_decorator(method):
    pruner, plain = quiet(method), quiet(method)
    make_trainer(pruner).fit(VarArgs(), loader())
    make_trainer(plain).fit(Classifier(), loader())
    assert pruner.masks == plain.masks


class Defaults(Classifier):
    def training_step(self, batch, batch_idx=None, extra=3):
        assert batch_idx is not None
        return super().training_step(batch, batch_idx)


def test_training_step_with_defaults():
    pruner, model = quiet("snip"), Defaults()
    make_trainer(pruner).fit(model, loader())
    assert pruned_max(model, pruner.masks) == 0.0


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("method", METHODS)
def test_given_batches_in_other_precisions(method, precision):
    pruner = quiet(method, batches=list(loader())[:2])
    model = Classifier()
    make_trainer(pruner, precision=precision).fit(model, loader())
    assert pruned_max(model, pruner.masks) == 0.0


def test_given_batches_go_through_the_modules_transfer_hooks():
    class Hooked(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch["x"], batch["y"]

    raw = [{"x": x, "y": y} for x, y in loader()]
    pruner, drawn = quiet("snip", batches=raw[:4]), quiet("snip")
    make_trainer(pruner).fit(Hooked(), DataLoader(raw, batch_size=None))
    make_trainer(drawn).fit(Hooked(), DataLoader(raw, batch_size=None))
    assert pruner.masks == drawn.masks


def test_no_training_batches():
    for method in ("snip", "grasp"):
        with pytest.raises(ValueError, match=r"no batch|no training batches"):
            make_trainer(quiet(method), limit_train_batches=0).fit(Classifier(), loader())
    for method in ("random", "magnitude"):
        trainer = make_trainer(quiet(method), limit_train_batches=0)
        trainer.fit(Classifier(), loader())
        assert trainer.global_step == 0


def test_several_modules_are_scored_alike_wherever_they_hang():
    """Two networks under one loss: every weight of both gets its own finite score."""
    for method in METHODS:
        pruner, model = quiet(method, 0.5), Gan()
        probe = Probe(pruner)
        make_trainer(pruner, probe).fit(model, loader())
        kept = {name: mask.float().mean().item() for name, mask in pruner.masks.items()}
        assert all(value > 0 for value in kept.values()), (method, kept)
