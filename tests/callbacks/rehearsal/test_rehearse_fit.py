"""What a rehearsal takes, gives back and refuses."""

import gc
import threading
import time
import weakref

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_graphon.callbacks._module.pool import draw_data
from lightning_graphon.callbacks._rehearsal.module_copy import copy_module
from lightning_graphon.callbacks._rehearsal.nested_trainer import NestedTrainer
from lightning_graphon.callbacks._rehearsal.rehearse import Changed, rehearse_fit
from lightning_graphon.dynamics import UnsupportedTrainingError
from lightning_graphon.pruning import Masks, prune
from tests.helpers.modules import Classifier, UserNetwork, cnn, loader, make_trainer, mlp
from tests.helpers.rehearsal_cases import OneCycle, adam


class Calls(Callback):
    """Calls a function of the trainer, the module, the pool and the probe when training starts."""

    def __init__(self, function):
        self.function, self.found = function, None

    def on_train_start(self, trainer, pl_module):
        data = draw_data(trainer, pl_module, 20, 48)
        probe, pool = data.probe, data.drawn
        self.found = self.function(trainer, pl_module, {"pool": pool, "probe": probe, "seed": 0, "masks": None})


def in_fit(function, module=None, data=None, **kwargs):
    calls = Calls(function)
    make_trainer(calls, **{"max_epochs": 5, **kwargs}).fit(module or Classifier(), data or loader())
    return calls.found


def rehearse(module=None, data=None, trainer=None, **arguments):
    return in_fit(
        lambda t, m, given: rehearse_fit(t, m, **{**given, "steps": range(6), **arguments}).losses,
        module,
        data,
        **trainer or {},
    )


def test_only_the_asked_steps_are_measured():
    every = rehearse()
    assert len(every) == 6
    assert rehearse(steps=[0, 3, 5]) == [every[0], every[3], every[5]]
    assert rehearse(steps=[2]) == [every[2]]
    assert rehearse(steps=[]) == []


def test_seeds_are_orders_of_batches():
    assert rehearse() == rehearse()
    first, second = rehearse(seed=1), rehearse(seed=2)
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_a_rehearsal_ends_where_training_does():
    assert len(rehearse(trainer={"max_epochs": 1})) == 4  # three steps
    assert len(rehearse(trainer={"max_steps": 2})) == 3


def test_progress_is_told_at_every_step():
    told = []
    rehearse(progress=told.append, trainer={"accumulate_grad_batches": 2})
    assert told == [1, 2, 3, 4, 5]


def test_the_time_is_kept():
    class Slow(Classifier):
        def training_step(self, batch, batch_idx):
            if isinstance(self.trainer, NestedTrainer) and len(batch[1]) == 16:  # a minibatch, and not the probe
                time.sleep(0.2)
            return super().training_step(batch, batch_idx)

    losses = rehearse(Slow(), seconds=0.3)
    assert 1 <= len(losses) < 4
    assert losses == rehearse()[: len(losses)]
    assert rehearse(seconds=0.0) == losses[:1]


def test_the_loss_of_the_user_is_measured():
    def doubled(module, batch):
        return 2 * module.training_step(batch, 0)

    assert rehearse(loss_fn=doubled) == pytest.approx([2 * loss for loss in rehearse()], rel=1e-6)  # float32


def test_a_transform_changes_the_copy_alone():
    def zero(twin):
        nn.init.zeros_(twin.net[-1].weight)
        nn.init.zeros_(twin.net[-1].bias)

    module = Classifier()
    losses = rehearse(module, change=zero)
    assert losses[0] == pytest.approx(2.302585)  # log 10
    assert module.net[-1].weight.abs().sum() > 0


def test_a_transform_may_bring_another_network_with_its_masks():
    seen = []

    def narrow(twin):
        twin.net = nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10))
        masks = prune(twin.net, "random", sparsity=0.5)
        seen.append(twin.net[0])
        masks = Masks({f"net.{name}": mask for name, mask in masks.items()})
        counts = []

        def watch(module, args):
            counts.append(int((module.weight == 0).sum()))

        twin.net[0].register_forward_pre_hook(watch)
        seen.append((counts, int((~masks["net.0.weight"]).sum())))
        return Changed(masks)

    losses = rehearse(Classifier(mlp, adam), change=narrow, resume=False)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    counts, expected = seen[1]
    assert set(counts) == {expected}


def test_masks_are_enforced_with_the_exact_counts():
    module = Classifier(mlp, adam)
    masks = Masks({f"net.{name}": mask for name, mask in prune(module.net, "magnitude", sparsity=0.9).items()})
    module = Classifier(mlp, adam)
    zeros = []

    def watch(twin):
        twin.register_forward_pre_hook(
            lambda m, args: zeros.append(sum(int((m.get_parameter(name) == 0).sum()) for name in masks))
        )

    rehearse(module, masks=masks, change=watch)
    assert set(zeros) == {masks.total - masks.kept}
    assert len(zeros) > 5
    assert all((p != 0).all() for p in module.parameters() if p.ndim == 2)


class Holds(Classifier):
    def __init__(self, value):
        super().__init__()
        self.inner = nn.Module()
        self.inner.secret = value


def test_what_cannot_be_copied_is_named():
    with pytest.raises(UnsupportedTrainingError, match=r"cannot be copied, because of its attribute inner\.secret"):
        rehearse(Holds(threading.Lock()))


@pytest.mark.parametrize("value", ["loss", "generator", "data"])
def test_what_is_often_held_can_be_copied(value):
    values = {
        "loss": (torch.ones(1, requires_grad=True) * 2).sum(),  # torch itself refuses to copy what has a graph
        "generator": torch.Generator(),
        "data": loader(),
    }
    assert rehearse(Holds(values[value])) == rehearse()


def test_data_that_a_module_holds_is_shared():
    data = loader()
    twin = in_fit(lambda t, m, given: copy_module(t, m, NestedTrainer(t, Callback())), Holds(data))
    assert twin.inner.secret is data


def test_the_trainer_that_a_part_knows_is_the_nested_one():
    class Asks(Classifier):
        def on_train_start(self):
            self.part = nn.Module()

        def training_step(self, batch, batch_idx):
            self.asked.append(type(self.known).__name__)
            return super().training_step(batch, batch_idx)

    module = Asks()
    module.asked = asked = []
    given = {}

    def function(trainer, pl_module, arguments):
        pl_module.known = trainer
        rehearse_fit(trainer, pl_module, steps=[1], change=lambda twin: given.update(twin=twin.known), **arguments)
        del pl_module.known
        trainer.should_stop = True
        pl_module.training_step = lambda batch, batch_idx: None
        return type(given["twin"]).__name__

    assert in_fit(function, module) == "NestedTrainer"
    assert asked == []


def test_errors_of_the_users_code_are_told():
    class Breaks(Classifier):
        def training_step(self, batch, batch_idx):
            if isinstance(self.trainer, NestedTrainer) and self.trainer.global_step == 2:
                raise RuntimeError("no more")
            return super().training_step(batch, batch_idx)

    with pytest.raises(UnsupportedTrainingError, match=r"the rehearsal failed \(RuntimeError: no more\)") as caught:
        rehearse(Breaks())
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_weights_that_froze_when_the_fit_began():
    class Freezes(Classifier):
        def on_fit_start(self):
            self.net[0].requires_grad_(False)

        def configure_optimizers(self):
            return adam([p for p in self.parameters() if p.requires_grad])

    class Frozen(Freezes):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

    assert rehearse(Freezes()) == rehearse(Frozen())


def test_iterators_of_data_are_refused():
    class Iterates(Classifier):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(UnsupportedTrainingError, match="dataloader_iter"):
        rehearse(Iterates())


def test_a_function_that_holds_the_original_is_noticed():
    class Closure(Classifier):
        def __init__(self):
            super().__init__()
            self.call = lambda x: self.net(x)

        def forward(self, x):
            return self.call(x)

    module = Closure()
    with pytest.raises(UnsupportedTrainingError, match="still trains the module itself"):
        rehearse(module)
    assert all(p.grad is None for p in module.parameters())
    assert all(map(torch.equal, module.parameters(), Classifier().parameters()))


@pytest.mark.parametrize("part", ["method", "network", "module"])
def test_compiled_parts_are_rehearsed_uncompiled(part):
    def broken(graph, inputs):
        raise AssertionError("compiled during a rehearsal")

    class Compiled(Classifier):
        def __init__(self):
            super().__init__(lambda: UserNetwork(mlp()))
            if part == "method":
                self.forward = torch.compile(self.forward, backend=broken)
            elif part == "network":
                self.net = torch.compile(self.net, backend=broken)
            else:
                self.compile(backend=broken)

    found = {}

    def function(trainer, pl_module, given):
        found["losses"] = rehearse_fit(trainer, pl_module, steps=range(6), **given).losses
        raise KeyError  # training would compile

    with pytest.raises(KeyError):
        in_fit(function, Compiled())
    assert found["losses"] == rehearse()


def test_a_batch_norm_asks_no_other_process():
    """And runs on a CPU, where that of several processes refuses to."""

    def function(trainer, pl_module, given):
        pl_module.norm = nn.SyncBatchNorm(64)
        twin = copy_module(trainer, pl_module, NestedTrainer(trainer, Callback()))
        x = torch.randn(8, 64)
        assert torch.equal(twin.norm(x), nn.BatchNorm1d(64)(x))
        assert twin.norm.num_batches_tracked == 1
        assert pl_module.norm.num_batches_tracked == 0
        assert type(pl_module.norm) is nn.SyncBatchNorm
        del pl_module.norm
        return True

    assert in_fit(function)


def test_networks_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=17, n_positions=8, n_embd=16, n_layer=2, n_head=2)

    class LanguageModel(Classifier):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__(lambda: transformers.GPT2LMHeadModel(config), adam)

        def training_step(self, batch, batch_idx):
            return self.net(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    ids = (torch.randint(17, (64, 1)) + torch.arange(8)) % 17
    data = [transformers.BatchEncoding({"input_ids": row, "labels": row}) for row in ids]
    collate = lambda rows: transformers.BatchEncoding(  # noqa: E731
        {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    )
    losses = rehearse(LanguageModel(), torch.utils.data.DataLoader(data, 16, collate_fn=collate))
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_the_memory_is_freed_at_once():
    gc.disable()
    try:
        kept = []
        rehearse(
            Classifier(cnn, adam),
            change=lambda twin: kept.extend(weakref.ref(p.untyped_storage()) for p in twin.parameters()),
            seconds=1e9,
        )
        assert kept
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_nothing_is_built_a_second_time():
    calls = []

    class Builds(OneCycle):
        def setup(self, stage):
            calls.append("setup")

        def prepare_data(self):
            calls.append("prepare_data")

        def configure_model(self):
            calls.append("configure_model")
            self.net = mlp()

        def configure_callbacks(self):
            calls.append("configure_callbacks")
            return []

    def function(trainer, pl_module, given):
        before = [*calls]
        rehearse_fit(trainer, pl_module, steps=range(4), **given)
        return before == calls

    assert in_fit(function, Builds())
