"""Parts of weights, on every rank of meshes of four processes that are only pretended; nothing is communicated."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_graphon.pruning import Enforcer, Masks, select_weights, summon_full_params
from lightning_graphon.pruning.sharding import full_tensor, is_sharded, local_shard, local_shard_like, unsharded_class
from tests.helpers.modules import needs_fsdp2


@pytest.fixture(params=range(4))
def rank(request):
    """One rank after the other in this process; DTensor caches by shape what a real process does at its only rank."""
    dist.init_process_group("fake", rank=request.param, world_size=4, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def chunk(tensor, parts, index, dim=0):
    """`torch.chunk`, with the empty ones that it leaves out."""
    chunks = tensor.chunk(parts, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


def test_one_axis_with_uneven_and_empty_parts(rank):
    mesh = init_device_mesh("cpu", (4,))
    for rows in (1, 3, 6, 9):
        full = torch.arange(rows * (2 + rank)).reshape(rows, 2 + rank)
        expected = chunk(full, 4, rank)
        like = DTensor.from_local(
            torch.zeros(expected.shape), mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride()
        )
        assert torch.equal(local_shard_like(full, like), expected)


def test_replicated_groups_partial_sums_and_two_axes(rank):
    mesh = init_device_mesh("cpu", (2, 2))
    a, b = divmod(rank, 2)
    full = torch.arange(7 * (5 + rank)).reshape(7, 5 + rank)
    cases = {
        (Replicate(), Shard(0)): chunk(full, 2, b),
        (Shard(0), Shard(1)): chunk(chunk(full, 2, a), 2, b, dim=1),
        (Shard(0), Shard(0)): chunk(chunk(full, 2, a), 2, b),
        (Partial(), Shard(1)): chunk(full, 2, b, dim=1),
        (Partial(), Partial()): full,
    }
    for placements, expected in cases.items():
        like = DTensor.from_local(
            torch.zeros(expected.shape), mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
        )
        assert torch.equal(local_shard_like(full, like), expected), placements


def test_fsdp_over_tensor_parallelism_cuts_the_parts_again(rank):
    """The rows are cut for tensor parallelism first, by the second axis of the mesh, although FSDP owns the first."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    net = nn.Sequential(nn.Linear(5 + rank, 7), nn.ReLU(), nn.Linear(7, 3 + rank))
    parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    try:
        for module in (net[0], net[2], net):
            fully_shard(module, mesh=mesh["data"])
    except NotImplementedError as error:  # torch 2.6 cuts only into equal parts here
        pytest.skip(str(error))
    data, tensor = divmod(rank, 2)
    rows = torch.arange(7 * (5 + rank)).reshape(7, 5 + rank)
    columns = torch.arange(7 * (3 + rank)).reshape(3 + rank, 7)
    assert torch.equal(local_shard_like(rows, net[0].weight), chunk(chunk(rows, 2, tensor), 2, data))
    assert torch.equal(local_shard_like(columns, net[2].weight), chunk(chunk(columns, 2, tensor, dim=1), 2, data))
    assert local_shard_like(rows, net[0].weight).shape == local_shard(net[0].weight).shape


def test_masks_are_applied_and_enforced_on_the_part_alone(rank):
    net = nn.Linear(3 + rank, 6)
    with torch.no_grad():
        net.weight.fill_(1.0)
    fully_shard(net, mesh=init_device_mesh("cpu", (4,)))
    mask = torch.arange(6 * (3 + rank)).reshape(6, 3 + rank) % 2 == 0
    weight, here = net.weight, chunk(mask, 4, rank)
    Masks({"weight": mask}).apply_(net)
    assert torch.equal(local_shard(weight) != 0, here)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    enforcer = Enforcer(net, Masks({"weight": mask}), optimizer)
    # The whole tensor has been written to, then only the part: both are noticed.
    for write in (lambda: weight.add_(1.0), lambda: local_shard(weight).add_(1.0)):
        with torch.no_grad():
            write()
        weight.grad = weight.detach().clone()
        for hook in weight._post_accumulate_grad_hooks.values():
            hook(weight)
        assert torch.equal(local_shard(weight) != 0, here)
        assert not local_shard(weight.grad)[~here].any()
    # A gradient that somebody made anew after autograd.
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not local_shard(weight)[~here].any()
    state = {"weight": torch.ones(6, 3 + rank), "another": torch.ones(2)}
    enforcer.zero_saved(state)
    assert torch.equal(state["weight"], mask.float())


@needs_fsdp2
def test_shards_are_enforced_also_after_a_forward_pass_that_left_the_weights_whole(rank):
    """FSDP keeps the root's weights whole until the backward pass; the optimizer knows the shards."""
    net = nn.Linear(3 + rank, 4)
    fully_shard(net, mesh=init_device_mesh("cpu", (4,)))
    weight, mask = net.weight, torch.arange(4 * (3 + rank)).reshape(4, 3 + rank) % 2 == 0
    net(torch.ones(1, 3 + rank))
    assert net.weight is not weight, "the weights must be whole for this test to say anything"
    with Enforcer(net, Masks({"weight": mask})):
        assert net.weight is weight
        assert weight._post_accumulate_grad_hooks
    assert torch.equal(local_shard(weight) != 0, chunk(mask, 4, rank))


def test_names_are_those_of_the_classes_before(rank):
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    for module in (*net, net):
        fully_shard(module, mesh=init_device_mesh("cpu", (4,)))
    assert list(select_weights(net, include="Linear")) == ["0.weight"]
    assert unsharded_class(net[1]) is nn.Conv1d


def test_hooks_come_back_in_their_order_also_after_an_error(rank):
    net = nn.Linear(2, 4)
    first, last = net.register_forward_pre_hook(lambda m, x: None), None
    fully_shard(net, mesh=init_device_mesh("cpu", (4,)))
    last = net.register_forward_pre_hook(lambda m, x: None)
    before, weight, kind = list(net._forward_pre_hooks.items()), net.weight, type(net)
    assert len(before) == 3

    def fail():
        with summon_full_params(net):
            assert not is_sharded(net.weight)
            assert len(net._forward_pre_hooks) == 2
            net.register_forward_hook(lambda m, x, y: None)
            raise KeyError("an error")

    with pytest.raises(KeyError, match="an error"):
        fail()
    assert list(net._forward_pre_hooks.items()) == before
    assert len(net._forward_hooks) == 2
    assert net.weight is weight
    assert type(net) is kind
    with summon_full_params(net):
        first.remove()
    last.remove()
    assert list(net._forward_pre_hooks.items()) == before[:1]


def test_plain_models_are_left_alone():
    net = nn.Linear(2, 2)
    net.register_forward_hook(lambda m, x, y: None)
    weight, hooks = net.weight, dict(net._forward_hooks)
    with summon_full_params(net):
        assert net.weight is weight
        assert dict(net._forward_hooks) == hooks
    assert full_tensor(weight) is weight
    assert local_shard(weight) is weight
