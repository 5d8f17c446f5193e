"""What objects hold is restored where it has changed, and nothing else is touched."""

import copy
import random
import threading
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon._shared.objects.object_state import preserve_objects

RNG = np.random.default_rng(7)


class FrozenDict(dict):
    """As of diffusers and flax: refuses every change."""

    def update(self, *args, **kwargs):
        raise TypeError("frozen")

    pop = setdefault = __delitem__ = __setitem__ = clear = update


class Sticky(dict):
    """May be changed by its own method alone."""

    clear = update = FrozenDict.update


class Slotted:
    __slots__ = ("count", "seen")

    def __init__(self):
        self.count, self.seen = 0, []


@dataclass(frozen=True)
class Frozen:
    seen: list


class Replay:
    def __init__(self):
        self.seen, self.slotted, self.frozen = deque(maxlen=3), Slotted(), Frozen([])
        self.by = defaultdict(list, a=[1])
        self.order = OrderedDict(a=1, b=2)
        self.counter, self.user, self.sticky = Counter("aab"), UserDict(a=1), Sticky(a=1)
        self.tuple, self.array, self.set = ([1], {"x": [2]}), np.arange(3.0), {1, 2}
        self.seen.append(0)

    def play(self):
        self.seen.extend([1, 2, 3])
        self.slotted.count += 1
        self.slotted.seen.append(1)
        self.frozen.seen.append(1)
        self.by["a"].append(2), self.by["b"].append(3)
        self.order.move_to_end("a")
        self.counter.update("abc")
        self.user["b"] = 2
        dict.update(self.sticky, b=2)
        self.tuple[0].append(2), self.tuple[1]["x"].append(3)
        self.array += 1
        self.set.add(3)
        self.new = 1


def contents(replay):
    state = {k: v for k, v in vars(replay).items() if k not in ("slotted", "array")}
    return copy.deepcopy(state), list(replay.order), replay.slotted.count, replay.slotted.seen, replay.array.tolist()


def test_plain_objects_come_back_in_place():
    replay = Replay()
    before, parts = contents(replay), [replay.seen, replay.by["a"], replay.tuple[0], replay.array]
    with preserve_objects(replay, room=100):
        replay.play()
        assert contents(replay) != before
    assert contents(replay) == before
    assert all(a is b for a, b in zip(parts, [replay.seen, replay.by["a"], replay.tuple[0], replay.array], strict=True))


class Frozenish(nn.Module):
    """What may not be written to: a frozen config, an expanded buffer, a read-only array."""

    def __init__(self):
        super().__init__()
        self.config = FrozenDict(width=32)
        self.register_buffer("wide", torch.zeros(1).expand(4))
        self.table = np.zeros(2)
        self.table.flags.writeable = False


def test_what_has_not_changed_is_not_touched():
    module = Frozenish()
    versions = module.wide._version
    with preserve_module_state(module):
        pass
    assert dict(module.config) == {"width": 32}
    assert module.wide._version == versions


def test_one_that_cannot_be_restored_does_not_keep_the_others_from_it():
    module = Frozenish()
    module.hidden, module.seen = torch.zeros(1).expand(4), []

    def work():
        with preserve_module_state(module):
            module.hidden.as_strided((1,), (1,)).add_(1)
            module.seen.append(1)

    with pytest.raises(RuntimeError):
        work()
    assert module.seen == []


def test_buffers_of_another_shape_and_of_inference_mode():
    module = nn.Module()
    module.register_buffer("minimum", torch.tensor([]))  # an observer of quantisation
    module.register_buffer("cast", torch.ones(2))
    with torch.inference_mode():
        module.register_buffer("state", torch.zeros(2))
        module.plain = torch.zeros(2)
    pointer, state = module.cast.data_ptr(), module.state
    with preserve_module_state(module):
        module.minimum.resize_(2).fill_(1)
        module.cast.data = module.cast.double() + 1
        module.state = module.state + 1
        with torch.inference_mode():
            state.add_(1)
            module.plain.add_(2)
    assert module.minimum.shape == (0,)
    assert (module.cast.data_ptr(), module.cast.dtype) == (pointer, torch.float32)
    assert module.state is state
    assert module.state.tolist() == module.plain.tolist() == [0, 0]


def test_tensors_that_share_memory_still_do():
    module = nn.Module()
    module.register_buffer("queue", torch.zeros(3))
    module.head = module.queue[:1]
    with preserve_module_state(module):
        module.queue += 1
    assert module.queue.tolist() == [0, 0, 0]
    module.queue[0] = 5
    assert module.head.item() == 5


class Hides(nn.Module):
    """A metric in a dict, a network in a list, an exponential average of the weights, a generator."""

    def __init__(self):
        super().__init__()
        torchmetrics = pytest.importorskip("torchmetrics")
        self.student = nn.Linear(2, 2)
        self.teacher = nn.Linear(2, 2).requires_grad_(False)
        self.metrics = {"train": torchmetrics.MeanMetric()}
        self.networks = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))]
        self.generator, self.rng, self.python = torch.Generator(), np.random.default_rng(0), random.Random(0)

    def forward(self, x):
        self.metrics["train"].update(x.sum())
        self.networks[0](x)
        self.networks[0][0].weight.requires_grad_(False).add_(1)
        self.teacher.weight.data.lerp_(self.student.weight.data, 0.5)
        self.teacher.bias.lerp_(self.student.bias.detach(), 0.5)
        return x + torch.rand((), generator=self.generator) + self.rng.random() + self.python.random()


def test_hidden_networks_metrics_and_generators_come_back():
    torch.manual_seed(0)
    module, x = Hides(), torch.randn(4, 2)
    before = copy.deepcopy(module)
    with preserve_module_state(module):
        first = module(x)
    for a, b in ((module, before), (module.networks[0], before.networks[0])):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert module.metrics["train"].weight == 0
    assert module.networks[0][0].weight.requires_grad
    assert torch.equal(module(x), first)


def test_a_large_tensor_is_not_copied_and_that_it_has_changed_is_told(monkeypatch):
    monkeypatch.setattr("lightning_graphon._shared.module_state._ROOM", 100)
    module = Hides()
    module.large, module.still = torch.zeros(100), torch.zeros(100)
    with pytest.warns(UserWarning, match=r"of shape \(100,\).*not undone") as told, preserve_module_state(module):
        module.large += 1
    assert len(told) == 1


def closure(rng):
    return lambda x: x + rng.random()


def globally(x):
    return x + RNG.random()


def inner(x):
    return next(globally(v) for v in [x])


class Transform:
    def __init__(self, rng):
        self.rng = rng

    def __call__(self, x):
        return x + self.rng.random()


class OfClass:
    rng = np.random.default_rng(3)

    def __call__(self, x):
        return x + self.rng.random()


class Legacy:
    rng = np.random.RandomState(3)

    def __call__(self, x):
        return x + self.rng.rand()


class Data(Dataset):
    def __init__(self, transform):
        self.transform, self.position = transform, 0
        self.samples = [(str(i), i) for i in range(2000)]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.position += 1
        return self.transform(self.position)


TRANSFORMS = {
    "object": lambda: Transform(np.random.default_rng(0)),
    "bit generator": lambda: Transform(np.random.Generator(np.random.PCG64(0))),
    "composed": lambda: nn.Sequential(Tensors()).forward,
    "closure": lambda: closure(random.Random(0)),
    "object in a closure": lambda: closure(Holder(random.Random(0))),
    "partial": lambda: partial(lambda rng, x: x + rng.random(), np.random.default_rng(0)),
    "bound method": lambda: Transform(random.Random(0)).__call__,
    "global": lambda: globally,
    "global of a global": lambda: inner,
    "class": OfClass,
    "RandomState": Legacy,
}


class Tensors(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return x + float(torch.rand((), generator=self.generator))


class Holder:
    def __init__(self, rng):
        self.random = rng.random


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_generators_wherever_a_dataset_keeps_them(kind):
    data = Subset(Data(TRANSFORMS[kind]()), range(8))
    with preserve_objects(data):
        first = [data[i] for i in range(3)]
    assert [data[i] for i in range(3)] == first
    assert data.dataset.position == 3


def test_what_works_with_threads_or_is_data_is_left_alone():
    class Writer:
        def __init__(self):
            self.lock, self.count = threading.Lock(), 0

    writer, large = Writer(), list(range(100_001))
    with preserve_objects({"writer": writer, "large": large, "thread": threading.current_thread()}):
        writer.count += 1
        large.append(1)
    assert writer.count == 1
    assert len(large) == 100_002


def test_cycles_and_spies_of_functions():
    module, spied = nn.Linear(1, 1), []
    module.itself = [module]
    module.hook = lambda: spied.append(1)
    with preserve_module_state(module):
        module.hook()
    assert spied == [1], "what a function uses is not the module's, but for its generators"
