"""Whether the whole weights fit is found without the other processes; these are only pretended here."""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_graphon.callbacks._meetings import Meetings


@pytest.fixture
def meetings():
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    net = nn.Linear(5, 8)
    fully_shard(net, mesh=init_device_mesh("cpu", (4,)))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    yield Meetings(SimpleNamespace(strategy=strategy, is_global_zero=False, optimizers=[]), net)
    dist.destroy_process_group()


def test_room_is_tried_for_the_whole_weights_and_a_preconditioner(meetings, monkeypatch):
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: made.append(args[0]) or empty(*args, **kwargs))
    assert meetings._has_room()
    assert made == [(8, 5), (8,)] * 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr
)
def test_there_is_none_where_memory_runs_out(meetings, monkeypatch, error):
    monkeypatch.setattr(torch, "empty", _raiser(error))
    assert not meetings._has_room()


def test_other_errors_are_errors(meetings, monkeypatch):
    monkeypatch.setattr(torch, "empty", _raiser(RuntimeError("device lost")))
    with pytest.raises(RuntimeError, match="device lost"):
        meetings._has_room()


def _raiser(error):
    def fail(*args, **kwargs):
        raise error

    return fail
