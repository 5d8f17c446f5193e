"""Scoring leaves no trace: training sees the batches, random numbers and module states it would have seen without."""

import collections
import random
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor
from lightning_graphon.callbacks._module.batches import train_batches
from tests.helpers.modules import METHODS, Classifier, Recorder, cnn, digits, loader, make_trainer, quiet, snapshot


def own_generator():
    return loader(shuffle=True, generator=torch.Generator().manual_seed(5))


def own_sampler():
    sampler = WeightedRandomSampler([1.0] * 96, 96, generator=torch.Generator().manual_seed(6))
    return loader(sampler=sampler)


def batch_sampler():
    sampler = RandomSampler(range(96), generator=torch.Generator().manual_seed(7))
    return DataLoader(TensorDataset(*digits()), batch_sampler=torch.utils.data.BatchSampler(sampler, 16, True))


class Augmented(TensorDataset):
    """Draws from every global generator for each sample."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.rand(()) + 0.1 * random.random() + float(0.1 * np.random.rand()), y


class OwnRandom(torch.utils.data.Sampler):
    """Another order each time, from its own generators of numpy and python and from a counter."""

    def __init__(self):
        self.old, self.new, self.python = np.random.RandomState(1), np.random.default_rng(1), random.Random(1)
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        first = [*self.old.permutation(32), *(32 + self.new.permutation(32))]
        last = [*range(64, 96)]
        self.python.shuffle(last)
        return iter(int(i) for i in [*first, *last][self.epoch :])

    def __len__(self):
        return 95


LOADERS = {
    "shuffle": partial(loader, shuffle=True),
    "own generator": own_generator,
    "own sampler": own_sampler,
    "batch sampler": batch_sampler,
    "sampler of its own": lambda: loader(sampler=OwnRandom()),
    "augmented": lambda: DataLoader(Augmented(*digits()), 16, shuffle=True),
    "dict of loaders": lambda: {"a": loader(shuffle=True), "b": own_generator()},
    "list of loaders": lambda: [loader(shuffle=True), loader(64, shuffle=True)],
}


class AnyBatch(Classifier):
    def training_step(self, batch, batch_idx):
        pairs = list(batch.values()) if isinstance(batch, dict) else batch
        pairs = pairs if isinstance(pairs[0], (list, tuple)) else [pairs]
        return sum(super(AnyBatch, self).training_step(pair, batch_idx) for pair in pairs)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return zip(*digits(self.count), strict=True)


class Unbatched(AnyBatch):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step(batch if y.ndim else [x[None], y[None]], batch_idx)


def fit(make_loader, *callbacks, validation=False, model=None, **kwargs):
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    recorder, after = Recorder(), {}

    class States(Callback):
        def on_train_start(self, trainer, pl_module):
            after.update(torch=torch.get_rng_state(), python=random.getstate(), numpy=np.random.get_state()[1].copy())
            after.update(snapshot(pl_module))

    trainer = make_trainer(*callbacks, recorder, States(), **kwargs)
    trainer.fit(model or AnyBatch(cnn), make_loader(), loader(32, shuffle=False) if validation else None)
    del after["ids"]
    return recorder, after


def same(a, b):
    leaves_a, leaves_b = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
    assert len(leaves_a) == len(leaves_b)
    for x, y in zip(leaves_a, leaves_b, strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y)
        elif isinstance(x, np.ndarray):
            assert np.array_equal(x, y)
        else:
            assert x == y


@pytest.mark.parametrize("kind", LOADERS, ids=[k.replace(" ", "-") for k in LOADERS])
@pytest.mark.parametrize("method", METHODS)
def test_first_batches_and_generators_as_without(method, kind):
    plain, plain_state = fit(LOADERS[kind])
    pruned, pruned_state = fit(LOADERS[kind], quiet(method, 0.0, batches=2))
    assert len(plain.batches) == 3
    same(plain.batches, pruned.batches)
    same(plain_state, pruned_state)
    # Dropout included: nothing at all differs from a dense run.
    assert plain.losses == pruned.losses


@pytest.mark.parametrize("method", METHODS)
def test_with_a_sanity_check_too(method):
    plain, plain_state = fit(LOADERS["shuffle"], validation=True)
    pruned, pruned_state = fit(LOADERS["shuffle"], quiet(method, 0.0), validation=True)
    same(plain.batches, pruned.batches)
    same(plain_state, pruned_state)
    assert plain.losses == pruned.losses


@pytest.mark.parametrize("persistent", [False, True], ids=["fresh workers", "persistent workers"])
def test_with_workers(persistent):
    make = partial(loader, shuffle=True, num_workers=2, persistent_workers=persistent)
    plain, _ = fit(make, max_epochs=2)
    pruned, _ = fit(make, quiet("snip", 0.0, batches=2), max_epochs=2)
    assert len(plain.batches) == 6
    same(plain.batches, pruned.batches)
    assert plain.losses == pruned.losses


class Doubled(DataLoader):
    """Gives its parent something else than what it was given: built from its attributes it would be doubled twice."""

    def __init__(self, data, times, **kwargs):
        super().__init__(torch.utils.data.ConcatDataset([data] * times), batch_size=16, **kwargs)


class Scaled(DataLoader):
    """Changes batches on the way, by a number that it keeps."""

    def __init__(self, *args, scale=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale

    def __iter__(self):
        return ((self.scale * x, y) for x, y in super().__iter__())


class Secretive(Scaled):
    def __init__(self, data, factor):
        super().__init__(data, batch_size=16, num_workers=2, persistent_workers=True, scale=factor)


WORKERS = {"num_workers": 2, "persistent_workers": True}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled(TensorDataset(*digits()), 2, shuffle=True, **WORKERS),
        lambda: Scaled(TensorDataset(*digits()), batch_size=16, shuffle=True, scale=3.0, **WORKERS),
    ],
    ids=["other constructor", "other batches"],
)
def test_loaders_of_users_with_persistent_workers(make):
    plain, _ = fit(make, max_epochs=2)
    pruned, _ = fit(make, quiet("snip", 0.0, batches=2), max_epochs=2)
    assert len(plain.batches) == 6
    same(plain.batches, pruned.batches)
    assert plain.losses == pruned.losses


def test_persistent_workers_that_cannot_be_left_alone_are_refused():
    with pytest.raises(ValueError, match=r"Secretive has persistent workers.* it has no data, factor\. Give it"):
        fit(lambda: Secretive(TensorDataset(*digits()), 3.0), quiet("snip", 0.0))


def test_the_batches_looked_at_are_those_of_training():
    """Whatever kind of loader they come from, persistent workers or none."""
    for make in (
        lambda **kwargs: Doubled(TensorDataset(*digits()), 2, **kwargs),
        lambda **kwargs: Scaled(TensorDataset(*digits()), batch_size=16, scale=3.0, **kwargs),
        lambda **kwargs: DataLoader(Stream(96), 16, drop_last=True, **kwargs),
        lambda **kwargs: DataLoader(TensorDataset(*digits()), None, **kwargs),
    ):
        for options in ({}, {**WORKERS, "num_workers": 1}):
            looked = []

            class Look(Callback):
                def on_fit_start(self, trainer, pl_module, looked=looked):
                    looked.extend(train_batches(trainer, pl_module, 3))

            recorder, _ = fit(partial(make, **options), Look(), model=Unbatched(cnn))
            same(looked, recorder.batches[:3])


def test_draws_only_the_batches_it_asks_for():
    drawn = []

    class Counted(TensorDataset):
        def __getitem__(self, index):
            drawn.append(index)
            return super().__getitem__(index)

    for method, expected in [("random", 0), ("magnitude", 0), ("snip", 32), ("synflow", 32)]:
        drawn.clear()

        class Stop(Callback):
            def on_train_start(self, trainer, pl_module):
                self.count = len(drawn)

        stop = Stop()
        make_trainer(quiet(method, batches=2), stop).fit(Classifier(), DataLoader(Counted(*digits()), 16))
        assert stop.count == expected, method


class Rich(Classifier):
    """Keeps metrics, counters, lists and flags, as real modules do, and changes all of them in training_step."""

    def __init__(self):
        super().__init__(cnn)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10)
        self.collection = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.SumMetric()])
        self.cat = torchmetrics.CatMetric()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.steps, self.history, self.by_name = 0, [], {"loss": 0.0}
        self.running = torch.zeros(3)
        self.net[9].requires_grad_(True)
        self.net[0].eval()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.collection.update(loss.detach())
        self.cat.update(loss.detach())
        self.seen += len(y)
        self.steps += 1
        self.history.append(loss.item())
        self.by_name["loss"] = loss.item()
        self.running += 1
        self.newcomer = 3
        self.net[9].bias.requires_grad_(False)
        self.log("acc", self.accuracy)
        return loss


def everything(module):
    state = snapshot(module)
    del state["ids"]
    metrics = {
        name: {k: getattr(m, k) for k in m._defaults} | {"n": m._update_count, "computed": m._computed}
        for name, m in module.named_modules()
        if isinstance(m, torchmetrics.Metric)
    }
    mine = {k: module.__dict__.get(k) for k in ("steps", "history", "by_name", "running", "newcomer")}
    return torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (state, metrics, mine)
    )


@pytest.mark.parametrize("eval_mode", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_module_is_untouched(method, eval_mode):
    model, seen = Rich(), {}
    before = everything(model)
    ids = [id(p) for p in model.parameters()]

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen["after"] = everything(pl_module)

    make_trainer(quiet(method, 0.0, eval_mode=eval_mode), Look(), limit_train_batches=1).fit(model, loader())
    same(before, seen["after"])
    assert [id(p) for p in model.parameters()] == ids
    assert model.seen == 16, "the metric of the one training step counts, and only that"


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_also_when_scoring_raises(method):
    class Breaks(Rich):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            torch.rand(3), random.random(), np.random.rand()
            if self.steps == 2 or method == "synflow":
                raise RuntimeError("no more")
            return loss

    model = Breaks()
    before = everything(model)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(RuntimeError, match="no more"):
        make_trainer(quiet(method), num_sanity_val_steps=0).fit(
            model, loader(shuffle=True, generator=torch.Generator())
        )
    same(before, everything(model))
    same(states, (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not {"log", "log_dict", "print", "manual_backward"} & set(model.__dict__)


def test_gradients_from_before_survive():
    model, seen = Classifier(), {}
    model.training_step(next(iter(loader())), 0).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}

    class Look(Callback):
        def on_fit_start(self, trainer, pl_module):
            seen.update({n: p.grad.clone() for n, p in pl_module.named_parameters()})

    make_trainer(quiet("snip", 0.0), Look()).fit(model, loader())
    same(before, seen)


def test_datamodule_is_set_up_once():
    calls = []

    class Data(pl.LightningDataModule):
        def setup(self, stage):
            calls.append(f"setup {stage.value!s}")

        def train_dataloader(self):
            calls.append("train_dataloader")
            return loader(shuffle=True)

    make_trainer(quiet("snip")).fit(Classifier(), datamodule=Data())
    assert calls == ["setup fit", "train_dataloader"]


def test_nested_state_is_untouched():
    class Keeps(Classifier):
        def __init__(self):
            super().__init__()
            self.outputs = {"train": []}
            self.queue, self.by = collections.deque(), collections.defaultdict(list)
            self.array = np.zeros(2)
            self.parts = [torch.zeros(2)]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.outputs["train"].append(1)
            self.queue.append(1)
            self.by["a"].append(1)
            self.array += 1
            self.parts[0] += 1
            return loss

    model, seen = Keeps(), {}

    class Look(Callback):
        def on_train_start(self, trainer, m):
            seen.update(
                outputs=len(m.outputs["train"]),
                queue=len(m.queue),
                by=len(m.by),
                array=m.array.sum(),
                parts=m.parts[0].sum().item(),
            )

    make_trainer(quiet("snip"), Look()).fit(model, loader())
    assert set(seen.values()) == {0}, seen


class Noise:
    """Has a generator of its own, as albumentations.Compose(seed=...) does."""

    def __init__(self):
        self.rng, self.generator = np.random.default_rng(0), torch.Generator()

    def __call__(self, x):
        return x + 0.1 * float(self.rng.standard_normal()) + 0.1 * torch.rand(x.shape, generator=self.generator)


class Noisy(torch.utils.data.Dataset):
    def __init__(self):
        self.transform, self.x, self.y = Noise(), *digits()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.transform(self.x[index]), self.y[index]


class NoisyStream(torch.utils.data.IterableDataset):
    """Goes on where it was, with noise."""

    def __init__(self):
        self.noise, self.position = Noise(), 0

    def __iter__(self):
        while self.position < 96:
            x, y = (values[self.position] for values in digits())
            self.position += 1
            yield self.noise(x), y


class Collates:
    def __init__(self):
        self.noise = Noise()

    def __call__(self, rows):
        x, y = torch.utils.data.default_collate(rows)
        return self.noise(x), y


GENERATORS = {
    "transform": lambda: DataLoader(Noisy(), 16, shuffle=True),
    "subset": lambda: DataLoader(torch.utils.data.Subset(Noisy(), range(96)), 16),
    "concatenated": lambda: DataLoader(torch.utils.data.ConcatDataset([Noisy(), Noisy()]), 16),
    "stream": lambda: DataLoader(NoisyStream(), 16),
    "collate": lambda: loader(collate_fn=Collates()),
}


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize(
    "callback",
    [
        lambda: quiet("snip", 0.0),
        lambda: GraphonMonitor(figure=False, verbose=False, raise_errors=True),
        lambda: LossDecayMonitor(figure=False, verbose=False, raise_errors=True, probe_size=32),
    ],
    ids=["PruneAtInit", "GraphonMonitor", "LossDecayMonitor"],
)
def test_generators_of_datasets_are_not_advanced(callback, kind):
    plain, _ = fit(GENERATORS[kind])
    watched, _ = fit(GENERATORS[kind], callback())
    same(plain.batches, watched.batches)
    assert plain.losses == watched.losses


def test_what_an_iterator_has_given_is_told():
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.rows = zip(*digits(), strict=True)

        def __iter__(self):
            return self.rows

    with pytest.warns(UserWarning, match=r"from an iterator \(zip\).*are missing in training. Give it a dataset"):
        fit(lambda: DataLoader(Once(), 16), quiet("snip", 0.0, batches=2))


@pytest.mark.parametrize("given", [False, True])
def test_transfer_hooks_leave_no_trace(given):
    class Hooked(AnyBatch):
        def __init__(self):
            super().__init__(cnn)
            self.noise = Noise()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return self.noise(batch[0]) + torch.rand(()), batch[1]

    plain, _ = fit(loader, model=Hooked())
    pruned, _ = fit(loader, quiet("snip", 0.0, batches=list(loader()) if given else 2), model=Hooked())
    same(plain.batches, pruned.batches)
