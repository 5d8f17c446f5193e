"""The pool that pushes and the probe that is measured: disjoint draws, and minibatches of the pool."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from lightning_graphon.callbacks._module.pool import DataExhaustedError, PoolLoader, draw_data, draw_probe
from lightning_graphon.callbacks._module.probe import join_samples, samples, select
from tests.helpers.kinds import Dicts
from tests.helpers.modules import Classifier, loader, make_trainer


class Draws(Callback):
    def __init__(self, *sizes, **kwargs):
        self.sizes, self.kwargs = sizes, kwargs

    def on_train_start(self, trainer, pl_module):
        data = draw_data(trainer, pl_module, *self.sizes, **self.kwargs)
        self.probe, self.pool = data.probe, data.drawn
        self.usual = draw_probe(trainer, pl_module, self.sizes[0], self.kwargs.get("seed", 0))


def numbered(n=96, **kwargs):
    """Every sample is its number."""
    x = torch.arange(n, dtype=torch.float32)
    return DataLoader(TensorDataset(x[:, None].expand(n, 64).clone(), x.long() % 10), 16, **kwargs)


def drawn(data, *sizes, **kwargs):
    draws = Draws(*sizes, **kwargs)
    make_trainer(draws, limit_train_batches=1).fit(Classifier(), data)
    return draws


@pytest.mark.parametrize(("probe", "pool"), [(20, 40), (16, 32), (16, 8), (5, 3), (20, 1000)])
def test_probe_and_pool_are_disjoint(probe, pool):
    found = drawn(numbered(shuffle=True), probe, pool, seed=3)
    first = found.probe[0][:, 0].tolist()
    rest = torch.cat([batch[0][:, 0] for batch in found.pool]).tolist()
    assert len(first) == probe
    assert len(rest) == min(pool, 96 - probe)
    assert len({*first, *rest}) == len(first) + len(rest)
    assert all(map(torch.equal, found.probe, found.usual))


def test_without_other_samples_the_probes_are_the_pool():
    found = drawn(numbered(16), 16, 40)
    assert sorted(found.pool[0][0][:, 0].tolist()) == sorted(found.probe[0][:, 0].tolist())


def test_batches_that_hold_more_than_samples_are_not_cut():
    """A graph's edges would point to nodes that are gone."""
    graphs = [{"x": torch.randn(n, 64), "edges": torch.randint(n, (2, 3 * n))} for n in (9, 11, 10, 12, 8)]

    class Graphs(Classifier):
        def training_step(self, batch, batch_idx):
            return self(batch["x"]).square().mean()

    draws = Draws(9, 24)
    make_trainer(draws, limit_train_batches=5).fit(Graphs(), DataLoader(graphs, None))
    assert len(draws.pool) >= 3
    for batch, graph in zip(draws.pool, graphs[1:], strict=False):
        assert torch.equal(batch["x"], graph["x"])


def test_samples_are_mixed_anew_in_each_epoch():
    pool = [[torch.arange(4), ["a", "b", "c", "d"]], [torch.arange(4, 7), ["e", "f", "g"]]]
    batches = PoolLoader(pool, 7, math.inf, seed=1)
    epochs = [next(batches) for _ in range(3)]
    for numbers, letters in epochs:
        assert sorted(numbers.tolist()) == list(range(7))
        assert letters == ["abcdefg"[i] for i in numbers]
    assert len({tuple(numbers.tolist()) for numbers, _ in epochs}) == 3
    again = PoolLoader(pool, 7, math.inf, seed=1)
    assert torch.equal(next(again)[0], epochs[0][0])
    assert not torch.equal(next(PoolLoader(pool, 7, math.inf, seed=2))[0], epochs[0][0])


def test_every_batch_is_full():
    batches = PoolLoader([[torch.arange(10)]], 4, math.inf, seed=0)
    seen = [next(batches)[0] for _ in range(5)]
    assert [len(x) for x in seen] == [4] * 5
    assert sorted(torch.cat(seen).tolist()) == sorted([*range(10)] * 2)


@pytest.mark.parametrize(
    "pool",
    [
        [[torch.zeros(2, 3), torch.zeros(2, 3)], [torch.ones(2, 5), torch.ones(2, 5)]],  # padded to different lengths
        [{"x": torch.zeros(4), "edges": torch.zeros(2, 9)}, {"x": torch.ones(4), "edges": torch.ones(2, 9)}],
        ["nothing", "that", "has", "samples"],
    ],
    ids=["padded", "graphs", "strings"],
)
def test_batches_that_cannot_be_joined_come_as_they_are(pool):
    assert join_samples(pool) is None
    batches = PoolLoader(pool, 2, math.inf, seed=0)
    for _ in range(2):
        seen = [str(next(batches)) for _ in pool]
        assert sorted(seen) == sorted(map(str, pool))


def test_what_has_no_samples_may_stay_where_it_is_the_same():
    pool = [{"x": torch.arange(3), "scale": torch.tensor(2.0)}, {"x": torch.arange(3, 6), "scale": torch.tensor(2.0)}]
    whole = join_samples(pool)
    assert whole["x"].tolist() == [0, 1, 2, 3, 4, 5]
    assert whole["scale"] == 2.0


def test_writing_into_a_batch_changes_no_other():
    batches = PoolLoader([torch.zeros(2, 3)], 2, math.inf, seed=0)
    next(batches).add_(1)
    assert next(batches).sum() == 0
    given = [torch.zeros(2)]
    next(PoolLoader([], 2, math.inf, 0, given)).add_(1)
    assert given[0].sum() == 0


def test_given_batches_end():
    batches = PoolLoader([], 1, 5, 0, [torch.zeros(1)])
    assert len(batches) == 5
    next(batches)
    with pytest.raises(DataExhaustedError):
        next(batches)


def test_a_loader_of_unknown_length_has_none():
    with pytest.raises(TypeError):
        len(PoolLoader([torch.zeros(1)], 1, math.inf, 0))


def test_samples_are_selected_of_every_kind_of_batch():
    batch = next(iter(DataLoader(Dicts(), 6)))
    chosen = select(batch, torch.tensor([4, 1]))
    assert samples(chosen) == 2
    assert chosen["name"] == ["digit 4", "digit 1"]
    assert torch.equal(chosen["image"], batch["image"][[4, 1]])


def test_no_data_is_told():
    class Early(Draws):
        def on_fit_start(self, trainer, pl_module):
            with pytest.raises(ValueError, match="there is no training data"):
                draw_data(trainer, pl_module, 4)
            self.told = True

    early = Early(4)
    make_trainer(early).fit(Classifier(), loader(0))
    assert early.told
