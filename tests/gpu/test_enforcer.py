"""Pruned weights stay exactly zero under everything that trains on a GPU."""

import copy

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.nn import functional as F

from lightning_graphon.pruning import Enforcer, prune
from tests.helpers.networks import mlp, seeded

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, fused=True),
    "adam, foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "adam, one by one": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False, amsgrad=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "rmsprop, centred": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adadelta": torch.optim.Adadelta,
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "rprop": torch.optim.Rprop,
}
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16 with GradScaler": torch.float16}


def digits_like(device, n=64):
    source = torch.Generator().manual_seed(1)
    return torch.rand(n, 64, generator=source).to(device), (torch.arange(n) % 10).to(device)


def network(device):
    return seeded(lambda: mlp(64, 4, inputs=64, outputs=10)).to(device)


def worst(net, masks):
    """Largest pruned weight, NaN where one is NaN."""
    return max(float(net.get_parameter(name)[~mask].abs().max().detach()) for name, mask in masks.items())


def train(net, optimizer, batch, precision=None, clip=False, steps=6, look=lambda: None):
    scaler = torch.amp.GradScaler(batch[0].device.type, enabled=precision is torch.float16, init_scale=1024.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(batch[0].device.type, precision, enabled=precision is not None):
            loss = F.cross_entropy(net(batch[0]), batch[1])
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        look()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_weights_are_zero_after_every_step(optimizer, precision, clip, device):
    net, batch = network(device), digits_like(device)
    masks = prune(net, "snip", sparsity=0.9, batches=[batch])
    trained = OPTIMIZERS[optimizer](net.parameters())
    seen = []
    with Enforcer(net, masks, trained):
        losses = train(net, trained, batch, PRECISIONS[precision], clip, look=lambda: seen.append(worst(net, masks)))
    assert seen == [0.0] * 6
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw, fused"])
def test_masked_training_is_that_of_the_cpu(optimizer, clip, device):
    """In float64, where rounding is nothing beside a gradient of a pruned weight that slipped through."""
    curves = []
    for place in ("cpu", device):
        net, batch = network(place).double(), digits_like(place)
        batch = (batch[0].double(), batch[1])
        masks = prune(net, "magnitude", sparsity=0.9)
        trained = OPTIMIZERS[optimizer](net.parameters())
        with Enforcer(net, masks, trained):
            curves.append(train(net, trained, batch, clip=clip, steps=20))
    assert curves[1] == pytest.approx(curves[0], rel=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adam, foreach", "adamw, fused"])
def test_gradients_that_somebody_revives_move_no_pruned_weight(optimizer, device):
    """As a penalty added to `.grad` by hand does; and its momentum does not move the weight in later steps."""
    net, batch = network(device), digits_like(device)
    masks = prune(net, "magnitude", sparsity=0.9)
    trained, seen = OPTIMIZERS[optimizer](net.parameters()), []
    with Enforcer(net, masks, trained):
        for step in range(6):
            trained.zero_grad()
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            if step == 2:
                for parameter in net.parameters():
                    parameter.grad.add_(1.0)
            trained.step()
            seen.append(worst(net, masks))
    assert seen == [0.0] * 6


def test_optimizer_inside_a_cuda_graph(device):
    """`capturable` optimizers keep their step count, and with it nothing that the host has to wait for."""
    net, batch = network(device), digits_like(device)
    masks = prune(net, "magnitude", sparsity=0.9)
    trained = torch.optim.Adam(net.parameters(), lr=1e-2, capturable=device.type == "cuda")
    with Enforcer(net, masks, trained):
        train(net, trained, batch)
        assert worst(net, masks) == 0.0


@pytest.fixture
def one_compiling_process():
    """A pool of them would outlive the test."""
    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw, fused"])
def test_compiled_networks_train_as_eager_ones(mode, optimizer, device, one_compiling_process):
    """Inductor alone, and with CUDA graphs, whose gradients live in memory of their own."""
    torch._dynamo.reset()
    net = network(device)
    twin, batch, curves = copy.deepcopy(net), digits_like(device), []
    masks = prune(net, "snip", sparsity=0.9, batches=[batch])
    for model, forward in ((net, net), (twin, torch.compile(twin, mode=mode))):
        trained = OPTIMIZERS[optimizer](model.parameters())
        with Enforcer(model, masks, trained):
            curves.append([])
            for _ in range(8):
                trained.zero_grad()
                torch.compiler.cudagraph_mark_step_begin()
                loss = F.cross_entropy(forward(batch[0]), batch[1])
                loss.backward()
                trained.step()
                assert worst(model, masks) == 0.0
                curves[-1].append(float(loss.detach()))
    # Sums in another order, eight steps long.
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
