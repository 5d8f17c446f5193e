"""Networks in which a unit only seems to be dead, or constant."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_graphon.compact import compact
from tests.helpers.compact_cases import chain, same, scramble, without
from tests.helpers.networks import seeded


def test_batch_norm_with_a_weight_of_zero_is_a_constant():
    model = scramble(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))).double()
    model[1].weight.data[[2, 3]] = 0
    small = compact(model, None, torch.rand(4, 4).double())
    assert small.model[0].out_features == 6
    same(model, None, small, torch.rand(3, 4).double())
    assert compact(model, None, torch.rand(4, 4).double(), mode="training").model[0].out_features == 8


def test_rows_of_a_tied_embedding_are_words():
    """Which the layer that shares them seems not to need."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.tied, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False), nn.Linear(9, 2)
            self.tied.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.tied(self.embedding(tokens)).relu().mean(1))

    model = scramble(Model()).double()
    masks = {"head.weight": torch.ones(2, 9, dtype=torch.bool)}
    masks["head.weight"][:, [1, 8]] = False
    small = compact(model, masks, torch.randint(9, (4, 7)))
    assert small.model.embedding.num_embeddings == len(small.model.tied.weight) == 9
    same(model, masks, small, torch.arange(9).reshape(3, 3))


def test_weights_without_a_mask_may_begin_at_zero():
    model = seeded(chain).double()
    nn.init.zeros_(model[4].weight)
    masks = without(model, **{"0__out": [1]})
    del masks["2.weight"], masks["4.weight"]
    assert compact(model, masks, torch.rand(4, 6).double(), mode="training").model[2].out_features == 10


def test_what_is_zero_before_a_sigmoid_is_not_zero_behind():
    """The next layer learns what to do with a half."""
    model = nn.Sequential(nn.Linear(6, 12, bias=False), nn.Sigmoid(), nn.Linear(12, 3)).double()
    masks = without(model, **{"0__out": [1, 4]})
    assert compact(model, masks, torch.rand(4, 6).double(), mode="training").model[0].out_features == 12
    assert compact(model, masks, torch.rand(4, 6).double()).model[0].out_features == 10


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_what_is_drawn_in_training_may_be_another_number(mode):
    class Dropped(nn.Module):
        """A whole block is left out for some samples, as by stochastic depth: for those of the example."""

        def __init__(self):
            super().__init__()
            self.first, self.branch, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.tail = nn.Linear(8, 2)

        def forward(self, x):
            x = self.first(x)
            if self.training:
                return self.head(x) + self.tail(self.branch(x) * torch.zeros(len(x), 1, dtype=x.dtype))
            return self.head(x)

    model = scramble(Dropped()).double()
    masks = without(model, head__in=[3], branch__in=[3])
    small = compact(model, masks, torch.rand(4, 4).double(), mode=mode)
    if mode == "training":  # eval calls no branch, and its mask cuts nothing in inference
        assert small.model.branch.weight.shape == (8, 7)
        assert bool(small.masks["branch.weight"].all())
        small.model.train()(torch.rand(4, 4).double())
    same(model, masks, small, torch.rand(3, 4).double())


class Attention(nn.Module):
    """One head, whose queries have a layer of their own, and values that are the positions'."""

    def __init__(self):
        super().__init__()
        self.hidden, self.query, self.key = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(4, 6)
        self.value, self.positions, self.head = nn.Linear(4, 6), nn.Parameter(torch.rand(5, 6)), nn.Linear(6, 2)

    def forward(self, x):
        value = self.value(x) + self.positions
        query = self.query(self.hidden(x).relu())
        attended = scaled_dot_product_attention(query[:, None], self.key(x)[:, None], value[:, None])
        return self.head(attended[:, 0])


def test_means_of_constants_that_differ_between_tokens_vary():
    model = scramble(Attention()).double()
    masks = without(model, value__out=[*range(6)])  # only positions are left
    small = compact(model, masks, torch.rand(4, 5, 4).double())
    assert small.model.hidden.out_features == 8
    same(model, masks, small, torch.rand(3, 5, 4).double())


def test_what_queries_read_is_needed():
    model = scramble(Attention()).double()
    masks = without(model, query__in=[0, 7])
    small = compact(model, masks, torch.rand(4, 5, 4).double())
    assert small.model.hidden.out_features == 6
    same(model, masks, small, torch.rand(3, 5, 4).double())


def test_a_class_token_has_the_units_of_the_others():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.token, self.head = nn.Linear(4, 8), nn.Parameter(torch.rand(1, 1, 8)), nn.Linear(8, 2)

        def forward(self, x):
            x = torch.cat([self.token.expand(len(x), -1, -1), self.first(x)], 1)
            return self.head(x.relu()).mean(1)

    model = scramble(Tokens()).double()
    masks = without(model, head__in=[3])
    small = compact(model, masks, torch.rand(4, 5, 4).double())
    assert small.model.token.shape == (1, 1, 7)
    assert small.model.first.out_features == 7
    same(model, masks, small, torch.rand(3, 5, 4).double())


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_padded_constant_is_another_number_at_the_border(value):
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ConstantPad2d(1, value), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    )
    model = scramble(model).double()
    masks = without(model, **{"0__out": [2]})
    small = compact(model, masks, torch.rand(4, 2, 4, 4).double())
    assert small.model[0].out_channels == 6
    same(model, masks, small, torch.rand(3, 2, 4, 4).double())
    model[0].bias.data[2] = value
    assert compact(model, masks, torch.rand(4, 2, 4, 4).double()).model[0].out_channels == 5


class Gated(nn.Module):
    """One gate for all units, from a hidden layer of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.gate, self.head = (nn.Linear(*s) for s in ((4, 8), (4, 6), (6, 1), (8, 2)))

    def forward(self, x):
        return self.head(self.first(x) * self.gate(self.hidden(x).relu()).sigmoid())


def test_what_a_gate_of_all_units_reads_is_needed():
    model = scramble(Gated()).double()
    masks = without(model, gate__in=[1], head__in=[4])
    small = compact(model, masks, torch.rand(4, 4).double())
    assert small.model.hidden.out_features == 5
    assert small.model.first.out_features == 7
    same(model, masks, small, torch.rand(3, 4).double())


def test_what_only_gates_of_glu_read_is_needed():
    model = scramble(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 12), nn.GLU(), nn.Linear(6, 2))).double()
    masks = without(model)
    masks["2.weight"][:6, [2, 5]] = False
    masks["2.weight"][6:, 5] = False
    small = compact(model, masks, torch.rand(4, 4).double())
    assert small.model[0].out_features == 7
    same(model, masks, small, torch.rand(3, 4).double())


def test_a_constant_in_a_group_that_stays_is_read_once():
    model = scramble(nn.Sequential(nn.Conv1d(2, 8, 1), nn.Conv1d(8, 6, 3, groups=2), nn.Tanh(), nn.Conv1d(6, 2, 1)))
    masks = without(model.double(), **{"0__out": [1, 6]})
    small = compact(model, masks, torch.rand(4, 2, 7).double())
    assert small.model[1].groups == 2
    assert not bool(small.model[1].weight[:3, 1].any())
    same(model, masks, small, torch.rand(3, 2, 7).double())
