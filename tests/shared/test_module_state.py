"""Scoring leaves no trace in the model or in any random number generator."""

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import preserve_module_state, preserve_random_state
from lightning_graphon.pruning import ScoringContext, prune
from tests.helpers.networks import CASES, seeded

METHODS = ["random", "magnitude", "snip", "grasp", "synflow"]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that scoring could change; tensors by identity, storage and content."""

    def of(tensor: Tensor | None) -> Any:
        return None if tensor is None else (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.tolist())

    return {
        "parameters": {n: (of(p.detach()), id(p), of(p.grad), p.requires_grad) for n, p in model.named_parameters()},
        "buffers": {n: of(b) for n, b in model.named_buffers()},
        "training": {n: m.training for n, m in model.named_modules()},
        "attributes": {n: sorted(k for k in m.__dict__ if not k.startswith("_")) for n, m in model.named_modules()},
    }


def comparable(shot: dict[str, Any]) -> dict[str, Any]:
    # `.detach()` makes a new Python object each time: drop its id, keep the storage.
    shot["parameters"] = {n: (v[0][1:], *v[1:]) for n, v in shot["parameters"].items()}
    return shot


def generators() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest), random.getstate()


def assert_untouched(model: nn.Module, action: Callable[[], Any]) -> None:
    before, numbers = comparable(snapshot(model)), generators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        action()
    assert comparable(snapshot(model)) == before
    assert generators() == numbers


@pytest.mark.parametrize("mode", ["train", "mixed"])
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "batchnorm", "residual", "tied", "frozen"])
def test_every_method_leaves_no_trace(name: str, method: str, with_grad: bool, mode: str) -> None:
    case = CASES[name]
    model = case.model().train()
    if mode == "mixed":
        list(model.modules())[-1].eval()
        list(model.modules())[1].eval()
    if with_grad:
        inputs, targets = case.data()
        case.loss(model(inputs), targets).backward()
    steps = 3 if method == "synflow" else 2
    assert_untouched(model, lambda: prune(model, method, sparsity=0.8, batches=case.batches(), steps=steps))


class Counting(nn.Module):
    """Counts its calls, keeps lists and tensors as plain attributes, and holds a metric."""

    def __init__(self) -> None:
        super().__init__()
        torchmetrics = pytest.importorskip("torchmetrics")
        self.layer = nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("absent", None)
        self.calls = 0
        self.history: list[float] = []
        self.table: dict[str, int] = {}
        self.running = torch.zeros(4)
        self.mean = torchmetrics.MeanMetric()
        self.values = torchmetrics.CatMetric()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.absent = torch.ones(2)
        self.history.append(1.0)
        self.table["calls"] = self.calls
        out = self.layer(x)
        with torch.no_grad():
            self.running += out.mean(0)
            self.mean.update(out)
            self.values.update(out[0])
        self.extra = "new"
        return out + torch.rand(()) + random.random() + float(np.random.rand())


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_counters_buffers_and_metrics_come_back(method: str) -> None:
    case, model = CASES["mlp"], seeded(Counting)
    model(case.data()[0])
    del model.extra
    model.absent = None
    expected = {"calls": model.calls, "history": list(model.history), "table": dict(model.table)}
    running, mean, values = model.running.clone(), model.mean.compute().clone(), list(model.values.value)
    # The metrics' own caches are compared through their values; float64 would not fit their float32 states.
    options = {"double": False} if method == "synflow" else {}
    assert_untouched(
        model, lambda: prune(model, method, sparsity=0.5, batches=case.batches(), steps=2, options=options)
    )
    assert {k: getattr(model, k) for k in expected} == expected
    assert torch.equal(model.running, running)
    assert torch.equal(model.mean.compute(), mean)
    assert len(model.values.value) == len(values)
    assert all(a is b for a, b in zip(model.values.value, values, strict=True))
    assert model.seen.item() == 1
    assert model.absent is None


class TroubleError(RuntimeError):
    """Raised in the middle of scoring."""


def explode(outputs: Tensor, targets: Tensor) -> Tensor:
    raise TroubleError


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_no_trace_after_a_loss_that_raises(method: str) -> None:
    case = CASES["batchnorm"]
    model = case.model()

    def action() -> None:
        with pytest.raises(TroubleError):
            prune(model, method, sparsity=0.5, batches=case.batches(), loss_fn=explode)

    assert_untouched(model, action)


def test_no_trace_after_a_method_that_raises_in_a_later_round() -> None:
    case = CASES["batchnorm"]
    model, rounds = case.model(), []

    def method(context: ScoringContext) -> dict[str, Tensor]:
        context.losses()[0]()
        torch.rand(3), random.random(), np.random.rand()
        context.model.eval()
        rounds.append(1)
        if len(rounds) == 3:
            raise TroubleError
        return {name: weight.detach().abs() for name, weight in context.weights.items()}

    def action() -> None:
        with pytest.raises(TroubleError):
            prune(model, method, sparsity=0.9, batches=case.batches(), steps=5)

    assert_untouched(model, action)
    assert len(rounds) == 3


def test_no_trace_after_synflow_fails_inside_the_network() -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(8, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(self.layer(x))
            raise TroubleError

    model = Fragile()

    def action() -> None:
        with pytest.raises(TroubleError):
            prune(model, "synflow", sparsity=0.5, batches=CASES["mlp"].batches())

    assert_untouched(model, action)


def test_training_continues_as_if_nothing_had_happened() -> None:
    """Dropout and BatchNorm in train mode: three steps after scoring equal three steps without."""
    case, losses = CASES["batchnorm"], []
    for score in (False, True):
        model = case.model()
        torch.manual_seed(7)
        optimizer = torch.optim.Adam(model.parameters())
        if score:
            prune(model, "snip", sparsity=0.5, batches=case.batches())
        for inputs, targets in case.batches() * 2:
            optimizer.zero_grad()
            loss = case.loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == losses[4:]


def test_inside_gradients_are_gone_and_seeds_are_set() -> None:
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    draws = []
    for _ in range(2):
        with preserve_module_state(layer, seed=5):
            assert layer.weight.grad is None
            draws.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
        random.random()
    assert draws[0] == draws[1]
    assert layer.weight.grad is not None


def test_without_a_seed_the_generators_go_on_and_come_back() -> None:
    numbers = generators()
    with preserve_random_state():
        assert generators() == numbers
        torch.rand(1), random.random(), np.random.rand()
        assert generators() != numbers
    assert generators() == numbers


def test_a_gpu_that_nobody_uses_is_neither_started_nor_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("get_rng_state", "manual_seed_all", "_lazy_init", "_lazy_call"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))
    with preserve_random_state(seed=3):
        inside = torch.rand(1)
    assert torch.equal(inside, torch.rand(1, generator=torch.Generator().manual_seed(3)))


def test_the_generator_of_mps_is_seeded_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    state = [torch.tensor([7])]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: state.__setitem__(0, torch.tensor([seed])))
    with preserve_random_state(seed=3):
        assert state[0].item() == 3
    assert state[0].item() == 7


def test_a_replaced_parameter_storage_comes_back() -> None:
    layer = nn.Linear(2, 2)
    before = copy.deepcopy(layer.state_dict())
    pointer = layer.weight.data_ptr()
    with preserve_module_state(layer):
        layer.weight.data = torch.zeros(2, 2, dtype=torch.float64)
        layer.weight.requires_grad_(False)
    assert layer.weight.data_ptr() == pointer
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight, before["weight"])
