"""Whether the whole weights fit is tried before anything is gathered; the other processes are only pretended here."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_graphon.callbacks import GraphonMonitor, PruneAtInit
from lightning_graphon.callbacks._distributed.sharded_analysis import (
    InsufficientMemoryError,
    ShardedAnalysis,
    check_memory_on_all_ranks,
)

SHAPES = [(8, 5), (8,)]


class Strategy:
    """Of one process among four; `others` have room or not."""

    root_device = torch.device("cpu")

    def __init__(self, others=True):
        self.others, self.asked = others, []

    def reduce_boolean_decision(self, decision):
        self.asked.append(decision)
        return decision and self.others


@pytest.fixture
def net():
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    net = nn.Linear(5, 8)
    fully_shard(net, mesh=init_device_mesh("cpu", (4,)))
    yield net
    dist.destroy_process_group()


@pytest.fixture
def made(monkeypatch):
    """Shapes and dtypes of what is tried."""
    made, empty = [], torch.empty

    def record(shape, dtype, device):
        made.append((shape, dtype))
        return empty(shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", record)
    return made


def no_memory(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "empty", fail)


class Trainer(SimpleNamespace):
    """Can be referred to weakly."""

    __hash__ = object.__hash__


def trainer_of(strategy, **kwargs):
    return Trainer(strategy=strategy, is_global_zero=False, optimizers=[], global_step=7, **kwargs)


def test_the_whole_of_what_is_cut_is_tried(net, made):
    net.register_buffer("plain", torch.zeros(3))
    check_memory_on_all_ranks(Strategy(), net)
    check_memory_on_all_ranks(Strategy(), net, dtype=torch.bool)
    assert made == [(s, dtype) for dtype in (torch.float32, torch.bool) for s in SHAPES]


def test_nothing_is_tried_and_nobody_asked_where_nothing_is_cut(made):
    net = nn.Linear(5, 8)
    made.clear()
    check_memory_on_all_ranks(None, net)
    assert made == []


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr
)
def test_there_is_none_where_memory_runs_out_here(net, monkeypatch, error):
    no_memory(monkeypatch, error)
    strategy = Strategy()
    with pytest.raises(InsufficientMemoryError, match="do not fit into the memory of every process"):
        check_memory_on_all_ranks(strategy, net)
    assert strategy.asked == [False]


def test_there_is_none_where_memory_runs_out_elsewhere(net):
    strategy = Strategy(others=False)
    with pytest.raises(InsufficientMemoryError):
        check_memory_on_all_ranks(strategy, net)
    assert strategy.asked == [True]


def test_other_errors_are_errors_when_the_others_know(net, monkeypatch):
    no_memory(monkeypatch, RuntimeError("device lost"))
    strategy = Strategy()
    with pytest.raises(RuntimeError, match="device lost"):
        check_memory_on_all_ranks(strategy, net)
    assert strategy.asked == [False]


def test_meetings_need_room_for_a_preconditioner_too(net, made):
    meetings = ShardedAnalysis(trainer_of(Strategy(others=False)), net)
    with meetings.meeting() as works:
        assert not works
    assert [shape for shape, _ in made] == SHAPES * 2
    assert meetings.next == math.inf


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("fatal", [True, False])
def test_a_graphon_monitor_says_so_once_in_the_first_process(net, caplog, monkeypatch, first, fatal):
    monkeypatch.setattr("lightning_graphon.callbacks._analysis.masks_in_use.read_masks", None)  # would gather
    trainer = trainer_of(Strategy(others=False), callbacks=[])
    trainer.is_global_zero = first
    watch = GraphonMonitor(raise_errors=fatal)
    if fatal:
        with pytest.raises(InsufficientMemoryError):
            watch.on_train_start(trainer, net)
        return
    with caplog.at_level(logging.WARNING, logger="lightning_graphon"):
        watch.on_train_start(trainer, net)
        watch.on_train_end(trainer, net)
    assert [record.getMessage() for record in caplog.records] == [
        f"GraphonMonitor shows no {shown} at step 7: the whole weights do not fit into the memory of every process"
        for shown in ("graphons", "spectrum")
    ] * first
    assert trainer.strategy.asked == [True] * 4


def test_masks_need_a_byte_a_weight_and_kernels_the_weights(net, made, monkeypatch):
    monkeypatch.setattr("lightning_graphon.callbacks._analysis.masks_in_use.read_masks", lambda *a: {})
    trainer = trainer_of(SimpleNamespace(root_device="cpu", reduce_boolean_decision=lambda d: d), callbacks=[])
    monkeypatch.setattr("lightning_graphon.callbacks.graphon_monitor.summon_full_params", _stop)
    with pytest.raises(InterruptedError):
        GraphonMonitor(raise_errors=True).on_train_start(trainer, net)
    assert [dtype for _, dtype in made] == [torch.bool] * 4 + [torch.float32] * 2


def _stop(module):
    raise InterruptedError


def test_nothing_is_pruned_where_another_process_has_no_room(net):
    """An error on all of them, and what to do instead."""
    pruner = PruneAtInit("magnitude", sparsity=0.5)
    with pytest.raises(InsufficientMemoryError, match=r"to score them: .*PruneAtInit.from_masks"):
        pruner._score(trainer_of(Strategy(others=False)), net, pruner.config)
    assert pruner.masks is None
