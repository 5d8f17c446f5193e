"""Cases that once went wrong: heavy ties, memory formats, odd inputs, odd models."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_graphon.pruning import LayerCollapseWarning, Masks, prune, select_weights
from lightning_graphon.pruning.allocation.layer_budgets import layer_budgets
from lightning_graphon.pruning.allocation.top_k import keep_largest
from lightning_graphon.pruning.enforcer import Enforcer
from tests.helpers.networks import CASES, mlp, seeded

INPUTS, TARGETS = CASES["mlp"].data()


# select.kth_largest returns `upper` when the bracket is one value without counting its ties
@pytest.mark.parametrize("keep", [1, 33_334, 100_001, 150_000])
def test_periodic_scores_keep_the_exact_number(keep: int) -> None:
    scores = (torch.arange(200_003) % 6).float()
    masks = keep_largest({"a": scores[:70_000].reshape(700, 100), "b": scores[70_000:]}, keep)
    expected = torch.zeros(200_003, dtype=torch.bool)
    expected[scores.sort(descending=True, stable=True).indices[:keep]] = True
    assert torch.equal(torch.cat([m.reshape(-1) for m in masks.values()]), expected)


# select.keep_largest: masks[name].view(-1) on channels_last
@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp", "synflow", "random"])
def test_channels_last_models(method: str) -> None:
    case = CASES["residual"]
    expected = prune(case.model(), method, sparsity=0.8, batches=case.batches(), steps=2)
    model = case.model().to(memory_format=torch.channels_last)
    masks = prune(model, method, sparsity=0.8, batches=case.batches(), steps=2)
    # other convolution kernels: only near ties may differ
    assert masks.kept == expected.kept
    assert sum(int((masks[n] != expected[n]).sum()) for n in masks) <= 2


def test_ties_of_a_transposed_score_go_by_logical_position() -> None:
    masks = keep_largest({"a": torch.ones(3, 4).T}, 2)
    assert masks["a"].tolist() == [[True, True, False]] + [[False] * 3] * 3


# prune: `list(batches or ())`
def test_a_loader_without_a_length() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(INPUTS, TARGETS, strict=True)

    net = seeded(mlp)
    masks = prune(net, "snip", sparsity=0.5, batches=DataLoader(Stream(), batch_size=16))
    assert masks == prune(net, "snip", sparsity=0.5, batches=CASES["mlp"].batches())


# reading the batches draws from the global generator
def test_reading_a_shuffled_loader_leaves_the_generator() -> None:
    loader = DataLoader(TensorDataset(INPUTS, TARGETS), 8, shuffle=True)
    before = torch.get_rng_state()
    prune(seeded(mlp), "snip", sparsity=0.5, batches=loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shuffled_loader_gives_the_same_masks_whatever_the_global_generator() -> None:
    loader, net, found = DataLoader(TensorDataset(INPUTS, TARGETS), 5, shuffle=True), seeded(mlp), []
    for scramble in (1, 2):
        torch.manual_seed(scramble)
        found.append(prune(net, "snip", sparsity=0.5, batches=loader, seed=3))
    assert found[0] == found[1]


# layer_budgets: full layers + floors exceed the total
def test_floors_and_full_layers_together_keep_the_total() -> None:
    budget = layer_budgets({"a": (2, 2), "b": (1000, 1000)}, 500_002, "er", {"a": 2, "b": 500_000})
    assert sum(budget.values()) == 500_002
    assert budget["a"] >= 2
    assert budget["b"] >= 500_000


def test_er_with_min_density_keeps_the_exact_number() -> None:
    masks = prune(mlp(width=64, inputs=2, outputs=2), "random", sparsity=0.5, allocation="er", min_density=0.49)
    assert masks.kept == round(0.5 * masks.total)


# gradients that do not come through AccumulateGrad
def test_gradients_written_by_hand_do_not_revive_weights() -> None:
    net = seeded(mlp)
    masks = prune(net, "random", sparsity=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with Enforcer(net, masks, optimizer):
        loss = nn.functional.cross_entropy(net(INPUTS), TARGETS)
        for parameter, grad in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
            parameter.grad = grad
        optimizer.step()
        assert all(not p.detach()[~mask].any() for p, mask in masks.pairs(net))


def test_gradient_noise_does_not_revive_weights() -> None:
    net = seeded(mlp)
    masks = prune(net, "random", sparsity=0.5)
    optimizer = torch.optim.Adam(net.parameters())
    with Enforcer(net, masks, optimizer):
        nn.functional.cross_entropy(net(INPUTS), TARGETS).backward()
        for parameter in net.parameters():
            parameter.grad.add_(0.01)
        optimizer.step()
        assert all(not p.detach()[~mask].any() for p, mask in masks.pairs(net))


# a dense state loaded after attaching
def test_weights_loaded_after_attaching_are_zero_after_the_next_step() -> None:
    net = seeded(mlp)
    dense = copy.deepcopy(net.state_dict())
    masks = prune(net, "random", sparsity=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Enforcer(net, masks, optimizer):
        net.load_state_dict(dense)
        nn.functional.cross_entropy(net(INPUTS), TARGETS).backward()
        optimizer.step()
        assert all(not p.detach()[~mask].any() for p, mask in masks.pairs(net))


# 0 / 0 in an optimizer with eps = 0
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop])
def test_an_optimizer_without_epsilon(kind: type) -> None:
    layer = nn.Linear(3, 1, bias=False)
    masks = Masks({"weight": torch.tensor([[True, False, True]])})
    optimizer = kind(layer.parameters(), eps=0.0)
    with Enforcer(layer, masks, optimizer):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert layer.weight[0, 1].item() == 0.0


# mixed precision in one network
def test_a_network_of_two_precisions() -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        scores = {
            "a": torch.rand(50, generator=generator).bfloat16(),
            "b": torch.rand(50, generator=generator),
            "c": torch.rand(50, generator=generator).double(),
        }
        masks = keep_largest(scores, 70)
        values = torch.cat([s.double() for s in scores.values()])
        kept = torch.cat(list(masks.values()))
        assert int(kept.sum()) == 70
        assert values[kept].min() >= values[~kept].max()


# integer scores of a user's method on more weights than the sample
def test_integer_scores() -> None:
    net = nn.Linear(400, 400)
    masks = prune(net, lambda p: {n: (w * 1000).int() for n, w in p.weights.items()}, sparsity=0.5)
    assert masks.kept == 80_000


# a lazy layer that is not selected
def test_a_lazy_layer_elsewhere() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(4))
    assert prune(net, "magnitude", sparsity=0.5, include="0").kept == 6


# in-place changes of weights while scoring
class MaxNorm(nn.Linear):
    """Clips its own weight in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def test_a_network_that_writes_to_its_weights_in_forward_is_told() -> None:
    # Undoing it would need a second copy of every model.
    net = nn.Sequential(MaxNorm(8, 4))
    with pytest.warns(UserWarning, match=r"wrote to its own parameter '0\.weight'"):
        prune(net, "snip", sparsity=0.5, batches=[(INPUTS, TARGETS)])


# plain attributes of other kinds
def test_containers_of_other_kinds_come_back() -> None:
    import collections

    import numpy as np

    class Busy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)
            self.queue, self.counter = collections.deque(maxlen=5), collections.Counter()
            self.nested, self.tensors, self.array = {"a": []}, [torch.zeros(1)], np.zeros(2)

        def forward(self, x: Tensor) -> Tensor:
            self.queue.append(1)
            self.counter["n"] += 1
            self.nested["a"].append(1)
            self.tensors[0].add_(1)
            self.array += 1
            return self.layer(x)

    net = Busy()
    prune(net, "snip", sparsity=0.5, batches=[(INPUTS, TARGETS)])
    assert not net.queue
    assert not net.counter
    assert net.nested == {"a": []}
    assert net.tensors[0].item() == 0
    assert net.array.sum() == 0


# SynFlow underflows without a word
def test_synflow_of_a_vanishing_flow() -> None:
    net = seeded(lambda: mlp(width=8, depth=200, bias=False))
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(0.01)
    masks = prune(net, "synflow", sparsity=0.5, steps=10)
    assert all(row["kept"] > 0 for row in masks.table())


# iterative SNIP/GraSP on a network that an earlier round disconnected
def test_a_network_that_dies_between_rounds_is_reported_as_collapse() -> None:
    case = CASES["residual"]
    with pytest.warns(LayerCollapseWarning):
        masks = prune(case.model(), "snip", sparsity=0.98, batches=case.batches(), allocation="er", steps=3)
    assert masks.kept == round(0.02 * masks.total)


# bad input
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss_fn": "mse"}, TypeError, "loss_fn .*'mse'"),
        ({"batches": 5}, TypeError, "batches .*5"),
        ({"batches": torch.ones(3, 8)}, TypeError, "batches"),
        ({"include": 5}, TypeError, "include .*5"),
        ({"include": "re:["}, ValueError, r"include .*re:\["),
        ({"options": "x"}, TypeError, "options .*'x'"),
        ({"allocation": {5: 0.5}}, TypeError, "allocation .*5"),
        ({"model": "net"}, TypeError, "model .*'net'"),
    ],
)
def test_bad_input(arguments: dict, error: type, message: str) -> None:
    arguments = {"model": mlp(), "method": "snip", "sparsity": 0.5, "batches": [(INPUTS, TARGETS)], **arguments}
    with pytest.raises(error, match=message):
        prune(**arguments)


def test_scores_that_are_no_mapping() -> None:
    with pytest.raises((TypeError, ValueError), match="must score|must return"):
        prune(mlp(), lambda p: [1], sparsity=0.5)


@pytest.mark.parametrize("masks", [5, {"a": {"shape": [3]}}])
def test_a_damaged_state(masks: object) -> None:
    with pytest.raises(ValueError, match="not a state of Masks|cannot hold"):
        Masks({}).load_state_dict({"format": 1, "masks": masks})


def test_a_frozen_layer_is_pruned_where_it_is_asked_for_by_name() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    assert list(select_weights(net, include="0")) == ["0.weight"]
    assert "0.weight" not in select_weights(net)
