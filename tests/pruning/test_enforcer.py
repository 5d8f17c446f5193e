"""Pruned weights stay exactly zero, whatever the optimizer."""

import copy
import io
import pickle
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_graphon.pruning import Masks, prune
from lightning_graphon.pruning import enforcer as enforce
from lightning_graphon.pruning.enforcer import Enforcer
from tests.helpers.networks import CASES, mlp, seeded


class Restless(Optimizer):
    """Moves every weight at every step, gradient or not."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.125)


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum and decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "restless": Restless,
}
INPUTS, TARGETS = CASES["mlp"].data()


def network() -> tuple[nn.Module, Masks]:
    net = seeded(mlp)
    return net, prune(net, "random", sparsity=0.6, seed=3)


def loss(net: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(net(INPUTS), TARGETS)


@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.Adamax])
def test_an_eps_that_float16_cannot_hold_does_not_make_pruned_weights_nan(make):
    net, mask = nn.Linear(8, 4).half(), torch.arange(32).view(4, 8) % 2 == 0
    optimizer = make(net.parameters(), lr=0.01)  # eps 1e-10 and 1e-8; 6e-8 is the least number of float16
    with Enforcer(net, Masks({"weight": mask}), optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            (net(torch.ones(2, 8).half()) - 1).square().mean().backward()
            optimizer.step()
            assert bool((net.weight[~mask] == 0).all())
    assert bool(net.weight.isfinite().all())
    assert bool((net.weight[mask] != 0).all())


def train(net: nn.Module, optimizer: Optimizer, steps: int, accumulate: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            loss(net).backward()
        optimizer.step()


def pruned_entries(net: nn.Module, masks: Masks) -> Tensor:
    return torch.cat([parameter.detach()[~mask] for parameter, mask in masks.pairs(net)])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("history", [0, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_zero_after_every_step(name: str, history: int, accumulate: int) -> None:
    net, masks = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, history)
    dense = {n: p.detach().clone() for n, p in net.named_parameters()}
    with Enforcer(net, masks, optimizer):
        assert not pruned_entries(net, masks).any()
        for _ in range(10):
            train(net, optimizer, 1, accumulate)
            assert not pruned_entries(net, masks).any()
        moved = [(p.detach() != dense[n])[masks[n]].float().mean() for n, p in net.named_parameters() if n in masks]
    assert min(moved) > 0.1  # the kept ones do train, but for those behind a dead unit


def test_the_kept_weights_move_as_under_a_mask_in_the_forward_pass() -> None:
    """The oracle multiplies weights by the mask inside the network; momentum starts fresh in both."""
    net, masks = network()
    oracle = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    mask = {name: masks[name] if name in masks else torch.ones_like(p) for name, p in oracle.items()}
    optimizers = [torch.optim.SGD(p, lr=0.1, momentum=0.9) for p in (net.parameters(), oracle.values())]
    with Enforcer(net, masks, optimizers[0]):
        for _ in range(5):
            train(net, optimizers[0], 1)
            optimizers[1].zero_grad()
            effective = {name: p * mask[name] for name, p in oracle.items()}
            nn.functional.cross_entropy(torch.func.functional_call(net, effective, INPUTS), TARGETS).backward()
            optimizers[1].step()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), (oracle[name] * mask[name]).detach())


def test_gradients_are_masked_before_clipping() -> None:
    net, masks = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with Enforcer(net, masks, optimizer):
        loss(net).backward()
        assert all(not p.grad[~masks[n]].any() for n, p in net.named_parameters() if n in masks)
        kept = torch.cat([p.grad[masks[n]] if n in masks else p.grad.flatten() for n, p in net.named_parameters()])
        total = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        torch.testing.assert_close(total, kept.norm())  # the norm that clipping saw is that of the kept gradients


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_bad_gradients_at_pruned_places_do_not_survive(bad: float, dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 1, bias=False, dtype=dtype)
    masks = Masks({"weight": torch.tensor([[True, False, True]])})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    with Enforcer(layer, masks, optimizer):
        layer.weight.backward(torch.tensor([[1.0, bad, 1.0]], dtype=dtype))
        assert layer.weight.grad.tolist() == [[1.0, 0.0, 1.0]]
        optimizer.step()
        assert layer.weight[0, 1].item() == 0.0
        assert torch.isfinite(layer.weight).all()


def test_bad_weights_and_state_at_pruned_places_are_zeroed() -> None:
    layer = nn.Linear(3, 1, bias=False)
    masks = Masks({"weight": torch.tensor([[True, False, True]])})
    optimizer = torch.optim.Adam(layer.parameters())
    layer.weight.backward(torch.tensor([[1.0, float("nan"), 1.0]]))
    optimizer.step()
    Enforcer(layer, masks, optimizer)
    assert layer.weight[0, 1].item() == 0.0
    state = optimizer.state[layer.weight]
    assert state["exp_avg"][0, 1].item() == 0.0
    assert state["exp_avg_sq"][0, 1].item() == 0.0
    assert state["exp_avg"][0, 0].item() != 0.0
    assert state["step"].item() == 1


ADAPTIVE = ("adam", "amsgrad", "adamw", "rmsprop", "adagrad", "nadam", "radam")


def second_moments(optimizer: Optimizer, net: nn.Module, masks: Masks) -> Tensor:
    """Those of pruned weights."""
    states = [(optimizer.state[parameter], mask) for parameter, mask in masks.pairs(net)]
    return torch.cat([state[key][~mask] for state, mask in states for key in enforce._SECOND_MOMENTS if key in state])


@pytest.mark.parametrize("name", ADAPTIVE)
def test_second_moments_of_pruned_weights_are_not_zero_and_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Square roots of exact zeros are slow. Without the lift the kept weights are the same, bit for bit."""
    trained = []
    for lifted in (True, False):
        if not lifted:
            monkeypatch.setattr(Enforcer, "_floor_second_moments", lambda self, optimizer: None)
        net, masks = network()
        optimizer = OPTIMIZERS[name](net.parameters())
        with Enforcer(net, masks, optimizer):
            train(net, optimizer, 5)
            assert second_moments(optimizer, net, masks).bool().all() == lifted
        assert not second_moments(optimizer, net, masks).any()  # detached
        trained.append(net)
    for one, other in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_second_moments_that_fade_are_lifted_again() -> None:
    net, masks = network()
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.5))
    with Enforcer(net, masks, optimizer):
        for _ in range(300):  # 0.5^300 is below the smallest float32
            train(net, optimizer, 1)
            assert second_moments(optimizer, net, masks).min() > 1e-30


def test_a_loaded_optimizer_state_does_not_revive_weights() -> None:
    """A resumed run loads its optimizer after the masks were attached."""
    net, masks = network()
    dense = copy.deepcopy(net)
    before = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    train(dense, before, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with Enforcer(net, masks, optimizer):
        optimizer.load_state_dict(before.state_dict())
        train(net, optimizer, 3)
        assert not pruned_entries(net, masks).any()


def test_two_optimizers_that_share_a_network() -> None:
    net, masks = network()
    first = torch.optim.Adam(net[0].parameters())
    second = Restless([*net[2].parameters(), *net[4].parameters()])
    with Enforcer(net, masks, first, second):
        for _ in range(3):
            loss(net).backward()
            first.step()
            second.step()
            assert not pruned_entries(net, masks).any()


def test_lbfgs_takes_a_closure() -> None:
    net, masks = network()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    with Enforcer(net, masks, optimizer):
        start = loss(net).item()
        optimizer.step(closure)
        assert not pruned_entries(net, masks).any()
    assert loss(net).item() < start


def test_parameters_keep_identity_and_the_optimizer_covers_them() -> None:
    net, masks = network()
    before = {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters())
    with Enforcer(net, masks, optimizer):
        train(net, optimizer, 2)
        assert {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()} == before
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in net.parameters()}


def test_detaching_ends_everything() -> None:
    net, masks = network()
    optimizer = Restless(net.parameters())
    with Enforcer(net, masks, optimizer):
        train(net, optimizer, 1)
    assert not pruned_entries(net, masks).any()
    loss(net).backward()
    assert any(p.grad[~masks[n]].any() for n, p in net.named_parameters() if n in masks)
    optimizer.step()
    assert pruned_entries(net, masks).all()


def test_masks_of_another_model_are_refused() -> None:
    _, masks = network()
    with pytest.raises(ValueError, match=r"another model: Linear has no parameter '0\.weight'"):
        Enforcer(nn.Linear(3, 3), masks)


def test_the_state_dict_is_that_of_the_dense_model_and_holds_zeros() -> None:
    net, masks = network()
    keys = list(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters())
    with Enforcer(net, masks, optimizer):
        train(net, optimizer, 3)
        assert list(net.state_dict()) == keys
        plain = mlp()
        plain.load_state_dict(net.state_dict(), strict=True)
    assert not pruned_entries(plain, masks).any()


def test_a_masked_network_can_be_copied_pickled_and_averaged() -> None:
    net, masks = network()
    optimizer = torch.optim.Adam(net.parameters())
    with Enforcer(net, masks, optimizer):
        train(net, optimizer, 2)
        copied, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        torch.save(net.state_dict(), io.BytesIO())
        average = torch.optim.swa_utils.AveragedModel(net)
        train(net, optimizer, 2)
        average.update_parameters(net)
        assert not pruned_entries(average.module, masks).any()
        assert not torch.equal(average.module[0].weight, copied[0].weight)
    for other in (copied, pickled):
        assert not pruned_entries(other, masks).any()
        torch.optim.SGD(other.parameters(), lr=0.1)
        loss(other).backward()
        # The copy is a plain network: no hook came along.
        assert other[0].weight.grad[~masks["0.weight"]].any()


def test_channels_last_weights() -> None:
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    masks = Masks({"weight": torch.rand(net.weight.shape) < 0.3})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with Enforcer(net, masks, optimizer):
        net(torch.ones(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
    assert torch.equal(net.weight != 0, masks["weight"])


def test_compiled_and_eager_masked_training_agree() -> None:
    """`fullgraph=True` raises at the first graph break; the aot backend needs no C++ compiler."""
    eager, masks = network()
    net = copy.deepcopy(eager)
    losses = []
    for model, forward in ((eager, eager), (net, torch.compile(net, fullgraph=True, backend="aot_eager"))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses.append([])
        with Enforcer(model, masks, optimizer):
            for _ in range(5):
                optimizer.zero_grad()
                value = nn.functional.cross_entropy(forward(INPUTS), TARGETS)
                value.backward()
                optimizer.step()
                losses[-1].append(value.item())
        assert not pruned_entries(model, masks).any()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # float32, another order of operations
    assert losses[0][-1] < losses[0][0]


class Lookahead(Optimizer):
    """Never calls `Optimizer.__init__`, and moves weights after its base has stepped, as timm's does."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.param_groups, self.state = base, base.param_groups, base.state
        weights = [p for group in base.param_groups for p in group["params"]]
        self.slow = {p: p.detach().clone() for p in weights}  # dense

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        self.base.step(closure)
        for parameter, slow in self.slow.items():
            parameter.copy_(slow.lerp_(parameter, 0.5))

    def load_state_dict(self, state_dict: dict) -> None:
        self.base.load_state_dict(state_dict)


class Unfinished(Lookahead):
    """Has the mark of a class whose step runs hooks, but none of their lists."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        super().step(closure)

    step.hooked = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrapper", [Lookahead, Unfinished])
def test_optimizers_that_wrap_others(wrapper: type) -> None:
    net, masks = network()
    optimizer = wrapper(torch.optim.Adam(net.parameters(), lr=0.01))
    with Enforcer(net, masks, optimizer):
        for _ in range(3):
            loss(net).backward()
            optimizer.step()
            assert not pruned_entries(net, masks).any()
        optimizer.load_state_dict({"state": {}, "param_groups": optimizer.base.state_dict()["param_groups"]})
    assert not {"step", "load_state_dict"} & vars(optimizer).keys()


def test_timm_lookahead() -> None:
    timm = pytest.importorskip("timm.optim")
    net, masks = network()
    optimizer = timm.Lookahead(torch.optim.AdamW(net.parameters(), lr=0.01), k=2)
    with Enforcer(net, masks, optimizer):
        for _ in range(5):
            loss(net).backward()
            optimizer.step()
            assert not pruned_entries(net, masks).any()


def test_frozen_weights_are_zeroed_and_stay_so_when_they_thaw() -> None:
    net, masks = network()
    net[0].requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with Enforcer(net, masks, optimizer):
        assert not net[0].weight.requires_grad
        assert not pruned_entries(net, masks).any()
        net[0].requires_grad_(True)
        for _ in range(3):
            loss(net).backward()
            assert not net[0].weight.grad[~masks["0.weight"]].any()
            optimizer.step()
            assert not pruned_entries(net, masks).any()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_collected_gradients_are_those_of_all_weights(accumulate: int) -> None:
    net, masks = network()
    dense = seeded(mlp)
    masks.apply_(dense)
    for _ in range(accumulate):
        loss(dense).backward()
    with Enforcer(net, masks, torch.optim.SGD(net.parameters(), lr=0.1)) as enforcer:
        loss(net).backward()
        net.zero_grad()
        enforcer.collect_gradients()
        for _ in range(accumulate):
            loss(net).backward()
            enforcer.collect_gradients()  # which is on already
            assert not any(net.get_parameter(name).grad[~mask].any() for name, mask in masks.items())
        found = enforcer.take_gradients()
        assert list(found) == list(masks)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, dense.get_parameter(name).grad)
        loss(net).backward()
        assert enforcer.take_gradients() == {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_are_replaced_in_place_and_what_comes_begins_at_zero(name: str) -> None:
    net, masks = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    given = masks["0.weight"]
    old = {n: mask.clone() for n, mask in masks.items()}
    with Enforcer(net, masks, optimizer) as enforcer:
        train(net, optimizer, 3)
        kept = net.get_parameter("0.weight").detach().clone()
        enforcer.update(prune(net, "random", sparsity=0.6, seed=4))
        assert masks["0.weight"] is given
        for n, mask in masks.items():
            parameter, stays = net.get_parameter(n), mask & old[n]
            assert (mask != old[n]).any()
            for tensor in (parameter.detach(), parameter.grad):
                assert tensor is not None
                assert not tensor[~stays].any()
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    assert not value[~stays].any()
        stays = given & old["0.weight"]
        assert torch.equal(net.get_parameter("0.weight")[stays], kept[stays])
        for _ in range(70):  # past a check of second moments
            train(net, optimizer, 1)
            assert not pruned_entries(net, masks).any()
        grown = given & ~old["0.weight"]
        assert (net.get_parameter("0.weight")[grown] != 0).float().mean() > 0.1
