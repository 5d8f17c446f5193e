"""A smaller network computes what the masked one does, also of inputs that it has not seen."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_graphon.compact import compact
from lightning_graphon.pruning import Masks
from tests.helpers.compact_cases import Attending, Image, Stream, chain, random_masks, same, scramble, without
from tests.helpers.networks import seeded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_chain_keeps_what_lies_on_a_path(bias, dtype):
    """Against counting paths: a hidden unit stays if an input reaches it and it reaches an output."""
    model = scramble(seeded(lambda: chain(bias))).to(dtype)
    masks = random_masks(model, density=0.3, dead=0.2, seed=1)
    small = compact(model, masks, torch.rand(4, 6, dtype=dtype))
    same(model, masks, small, torch.rand(9, 6, dtype=dtype), tolerance=1e-12 if dtype == torch.float64 else 1e-5)
    first, second, third = (masks[f"{i}.weight"].long() for i in (0, 2, 4))
    alive = (first.sum(1) > 0) & ((third @ second).sum(0) > 0)
    then = ((second @ first).sum(1) > 0) & (third.sum(0) > 0)
    assert [m.out_features for m in small.model if isinstance(m, nn.Linear)] == [int(alive.sum()), int(then.sum()), 3]
    assert 0 < int(alive.sum()) < 12
    assert 0 < int(then.sum()) < 10


def test_original_is_untouched():
    model = scramble(seeded(chain))
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    compact(model, random_masks(model), torch.rand(4, 6))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bias", [-0.7, 0.4])
def test_a_unit_that_is_constant_goes_into_the_next_bias(bias):
    """The second: its input is a ReLU of a negative or positive constant."""
    model = seeded(chain).double()
    model[0].bias.data[[1, 4]] = bias
    masks = without(model, **{"0__out": [1, 4]})
    small = compact(model, masks, torch.rand(4, 6).double())
    assert small.model[0].out_features == 10
    expected = model[2].bias + model[2].weight[:, [1, 4]].sum(1) * max(bias, 0)
    torch.testing.assert_close(small.model[2].bias, expected, rtol=1e-12, atol=1e-12)
    same(model, masks, small, torch.rand(5, 6).double())


def test_layers_without_bias_get_one():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2, bias=False)).double()
    masks = without(model, **{"0__out": [0, 5]})
    small = compact(model, masks, torch.rand(3, 4).double())
    assert small.model[2].bias is not None
    assert small.model[0].out_features == 4
    same(model, masks, small, torch.rand(5, 4).double())


@pytest.mark.parametrize(("padding", "channels"), [(0, 5), (1, 8)])
def test_constants_are_not_folded_where_padding_makes_a_border(padding, channels):
    model = scramble(seeded(lambda: Image(padding))).double()
    model.norm.bias.data[:3] = 2.0
    model.norm.running_mean.zero_()
    masks = without(model, first__out=[0, 1, 2])
    small = compact(model, masks, torch.rand(4, 2, 8, 8).double())
    assert small.model.first.out_channels == small.model.norm.num_features == channels
    same(model, masks, small, torch.rand(3, 2, 8, 8).double())


def test_channels_that_are_zero_at_the_border_too_go():
    model = scramble(seeded(lambda: Image(1))).double()
    model.norm.bias.data[:3] = -5.0  # which the ReLU makes zero
    masks = without(model, first__out=[0, 1, 2])
    small = compact(model, masks, torch.rand(4, 2, 8, 8).double())
    assert small.model.first.out_channels == 5
    same(model, masks, small, torch.rand(3, 2, 8, 8).double())


def test_flattened_channels_take_all_their_columns_along():
    model = scramble(seeded(lambda: Image(1))).double()
    masks = without(model, head__in=[*range(16), *range(32, 44)])  # channel 0 wholly, 2 in part
    small = compact(model, masks, torch.rand(4, 2, 8, 8).double())
    assert small.model.second.out_channels == 5
    assert small.model.head.in_features == 80
    same(model, masks, small, torch.rand(3, 2, 8, 8).double())


def test_a_stream_loses_what_all_blocks_agree_on():
    model = scramble(seeded(Stream)).double()
    every = {"head__in": [1, 2], "up__0__in": [1, 2], "up__1__in": [1]}
    masks = without(model, **every)
    small = compact(model, masks, torch.rand(4, 4).double())
    assert small.model.stem.out_features == 7  # unit 2 is read by the second block
    assert small.model.scale.shape == (7,)
    assert small.model.down[1].out_features == 7
    same(model, masks, small, torch.rand(3, 4).double())
    last = next(layer for layer in small.report.layers if layer.name == "down.1.weight")
    assert last.idle == 1  # nobody reads unit 2 after the second block
    assert "goes with it" in str(small.report)


def test_what_only_a_dead_part_of_the_stream_reads_goes():
    """Hidden units of the last block that only write to what nobody reads afterwards."""
    model = scramble(seeded(Stream)).double()
    masks = without(model, head__in=[2])
    masks["down.1.weight"][:, :4] = False
    masks["down.1.weight"][2, :4] = True
    small = compact(model, masks, torch.rand(4, 4).double())
    assert small.model.up[1].out_features == 6
    assert small.model.stem.out_features == 8
    same(model, masks, small, torch.rand(3, 4).double())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm = nn.Conv1d(3, 6, 1), nn.Conv1d(3, 5, 3), nn.BatchNorm1d(11)
        self.deep, self.grouped = nn.Conv1d(11, 11, 3, groups=11), nn.Conv1d(11, 8, 1)
        self.pairs, self.head = nn.Conv1d(8, 12, 3, groups=4, bias=False), nn.ConvTranspose1d(12, 2, 3)

    def forward(self, x):
        x = self.norm(torch.cat([self.left(x)[..., 1:-1].clone(), self.right(x)], 1)).relu()
        return self.head(self.pairs(self.grouped(self.deep(x)).tanh()))


def test_concatenations_and_groups():
    model = scramble(seeded(Branches)).double()
    masks = without(model, deep__out=[0, 7], left__out=[2], pairs__out=[3, 4, 5], head__in=[0])
    masks["head.weight"][0] = False
    small = compact(model, masks, torch.rand(4, 3, 9).double())
    new = small.model
    # Of the depthwise layer channel 2 is constant, too, and of the groups of three the second.
    assert (new.left.out_channels, new.right.out_channels, new.norm.num_features) == (4, 4, 8)
    assert (new.deep.groups, new.deep.in_channels, new.deep.out_channels) == (8, 8, 8)
    assert (new.pairs.groups, new.pairs.in_channels, new.pairs.out_channels, new.grouped.out_channels) == (3, 6, 9, 6)
    assert new.head.in_channels == 9
    same(model, masks, small, torch.rand(3, 3, 9).double())


class Words(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.rand(1, 5, 8))
        self.body, self.out = nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(torch.relu(self.body(self.embedding(tokens) + self.positions)))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_shared_weights(tied):
    model = scramble(seeded(lambda: Words(tied))).double()
    masks = without(model, body__in=[0, 3, 4])
    if not tied:
        masks["out.weight"][:, 6] = False
    tokens = torch.randint(11, (4, 5))
    small = compact(model, masks, tokens)
    new = small.model
    assert new.embedding.embedding_dim == 8 if tied else 5
    assert new.positions.shape == (1, 5, new.embedding.embedding_dim)
    assert (new.out.weight is new.embedding.weight) is tied
    same(model, masks, small, torch.randint(11, (3, 5)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.both, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.both(torch.relu(self.both(torch.relu(self.first(x))))))


def test_a_layer_that_is_called_twice():
    model = scramble(seeded(Twice)).double()
    masks = without(model, both__out=[2], head__in=[2, 5], first__out=[1])
    small = compact(model, masks, torch.rand(4, 4).double())
    same(model, masks, small, torch.rand(3, 4).double())
    masks["both.weight"][:, [2, 5]] = False
    small = compact(model, masks, torch.rand(4, 4).double())
    assert small.model.both.weight.shape == (6, 6)
    same(model, masks, small, torch.rand(3, 4).double())


def test_a_layer_that_reads_different_constants_in_two_calls():
    model = scramble(Twice()).double()
    model.first.bias.data[1], model.both.bias.data[1] = 0.5, 0.9
    masks = without(model, first__out=[1], both__out=[1])
    small = compact(model, masks, torch.rand(4, 4).double())
    assert small.model.both.weight.shape == (8, 8)
    same(model, masks, small, torch.rand(3, 4).double())


def test_constants_that_no_bias_can_take_stay():
    model = scramble(Own(lambda model, x: torch.nn.functional.linear(x.tanh(), model.extra))).double()
    model.extra = nn.Parameter(torch.rand(6, 6).double())
    masks = {"first.weight": torch.ones(6, 4, dtype=torch.bool)}
    masks["first.weight"][2] = False
    small = compact(model, masks, torch.rand(3, 4).double())
    assert small.model.first.out_features == 6
    same(model, masks, small, torch.rand(3, 4).double())
    model.extra.data[:, 2] = 0
    small = compact(model, masks, torch.rand(3, 4).double())
    assert small.model.first.out_features == small.model.extra.shape[1] == 5
    same(model, masks, small, torch.rand(3, 4).double())


def test_heads_of_attention_go_as_a_whole():
    model = scramble(seeded(Attending)).double()
    masks = without(model, encoder__linear2__in=[0, 5])
    masks["attention.out_proj.weight"] = torch.ones(12, 12, dtype=torch.bool)
    masks["attention.out_proj.weight"][:, 3:7] = False  # the second head, and a unit of the third
    masks["encoder.self_attn.in_proj_weight"] = torch.ones(36, 12, dtype=torch.bool)
    masks["encoder.self_attn.in_proj_weight"][24:28] = False  # values of the first head are constants
    small = compact(model, masks, torch.rand(4, 5, 6).double())
    new = small.model
    assert (new.attention.num_heads, new.attention.in_proj_weight.shape[0]) == (3, 27)
    assert (new.encoder.self_attn.num_heads, new.encoder.self_attn.out_proj.in_features) == (2, 8)
    assert new.encoder.linear1.out_features == 14
    assert new.first.out_features == 12  # its units are normalised together
    same(model, masks, small, torch.rand(3, 5, 6).double())


def test_masks_of_some_layers_or_none():
    model = scramble(seeded(chain)).double()
    masks = {"2.weight": random_masks(model)["2.weight"]}
    same(model, masks, compact(model, masks, torch.rand(4, 6).double()), torch.rand(3, 6).double())
    Masks(masks).apply_(model)
    small = compact(model, None, torch.rand(4, 6).double())
    assert small.report.parameters.after < small.report.parameters.before
    same(model, None, small, torch.rand(3, 6).double())


def test_hooks_and_buffers_count():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = chain()
            self.register_buffer("scale", torch.rand(12) + 0.5)

        def forward(self, x):
            return self.net[2:](self.net[0](x).relu() * self.scale)

    model = scramble(seeded(Scaled)).double()
    model.net[2].register_forward_hook(lambda module, args, out: out.sin())
    masks = random_masks(model)
    small = compact(model, masks, torch.rand(4, 6).double())
    assert small.model.scale.shape == (small.model.net[0].out_features,) != (12,)
    same(model, masks, small, torch.rand(3, 6).double())


def test_lightning_modules_stay_what_they_are():
    class Module(pl.LightningModule):
        def __init__(self, width):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

        def forward(self, x):
            return self.net(x)

    model = Module(12)
    small = compact(model, random_masks(model), (torch.rand(4, 6),)).model
    assert isinstance(small, Module)
    assert small.hparams.width == 12
    assert small.net[0].out_features < 12


def test_numbers_in_code_are_found_out():
    """Both split units by numbers of the dense network; what they concern stays."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.hidden = nn.Linear(4, 12), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            left, right = self.first(x).relu().view(-1, 12).split(6, 1)
            return self.hidden(self.second(left - 2 * right).relu())

    model = scramble(seeded(Fixed)).double()
    masks = without(model, second__in=[0], hidden__in=[1, 2])
    small = compact(model, masks, torch.rand(4, 4).double())
    assert small.model.first.out_features == 12
    assert small.model.second.out_features == 6
    assert "may count on its place" in str(small.report)
    same(model, masks, small, torch.rand(3, 4).double())


class Own(nn.Module):
    """Somebody's function between two layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 6), nn.Linear(6, 2), function

    def forward(self, x):
        return self.second(self.function(self, self.first(x)))


class Cumulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.cumsum(-1)


@pytest.mark.parametrize(
    "function",
    [
        lambda model, x: x.cumsum(-1),
        lambda model, x: x.softmax(-1),
        lambda model, x: Cumulated.apply(x),
        lambda model, x: torch.from_numpy(x.detach().numpy().cumsum(-1)),
        lambda model, x: torch.tensor(x.tolist(), dtype=x.dtype),
    ],
)
def test_what_has_no_rule_keeps_its_units(function):
    model = scramble(Own(function)).double()
    masks = without(model, second__in=[0])
    small = compact(model, masks, torch.rand(3, 4).double())
    assert small.model.first.out_features == 6
    same(model, masks, small, torch.rand(3, 4).double())


def test_what_does_not_work_smaller_is_refused_and_nothing_lost():
    def asks(model, x):
        assert len(model.first.weight) == 6, "six units"
        return x

    model = Own(asks)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="cannot be made smaller.*six units"):
        compact(model, without(model, second__in=[0]), torch.rand(3, 4))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: parametrizations.spectral_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 2),
    ],
)
def test_computed_weights_are_refused(change):
    model = chain()
    change(model[2])
    with pytest.raises(ValueError, match="'2' is computed"):
        compact(model, None, torch.rand(2, 6))


def test_masks_of_another_model_and_bad_modes():
    model = chain()
    with pytest.raises(ValueError, match="made for another model"):
        compact(model, {"9.weight": torch.ones(2, 2, dtype=torch.bool)}, torch.rand(2, 6))
    with pytest.raises(ValueError, match="mode"):
        compact(model, None, torch.rand(2, 6), mode="now")


def test_a_layer_that_is_dead_keeps_one_unit():
    model = scramble(seeded(Stream)).double()
    masks = without(model, up__0__out=[*range(10)])
    small = compact(model, masks, torch.rand(4, 4).double())
    assert small.model.up[0].out_features == 1
    same(model, masks, small, torch.rand(3, 4).double())


def test_export():
    model = scramble(seeded(lambda: Image(1))).double()
    small = compact(model, random_masks(model), torch.rand(4, 2, 8, 8).double()).model.eval()
    x = torch.rand(4, 2, 8, 8).double()
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_small_attention_is_torchs(need_weights, batch_first):
    """With masks, which `compact` itself does not give: against torch's module whose lost head adds nothing."""
    from lightning_graphon.compact.multihead import SmallMultiheadAttention

    torch.manual_seed(0)
    dense = nn.MultiheadAttention(6, 3, batch_first=batch_first).double()
    dense.out_proj.weight.data[:, 2:4] = 0
    stays, rows = torch.tensor([0, 1, 4, 5]), torch.tensor([0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17])
    cut = copy.deepcopy(dense)
    cut.in_proj_weight, cut.in_proj_bias = (
        nn.Parameter(t[rows].detach()) for t in (dense.in_proj_weight, dense.in_proj_bias)
    )
    cut.out_proj.weight = nn.Parameter(dense.out_proj.weight[:, stays].detach())
    small, x = SmallMultiheadAttention(cut, 2, 2), torch.rand(4, 4, 6).double()
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1, 3] = True
    causal = nn.Transformer.generate_square_subsequent_mask(4).double()
    for options in ({}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"attn_mask": causal != 0}):
        expected, found = (m(x, x, x, need_weights=need_weights, **options)[0] for m in (dense, small))
        torch.testing.assert_close(found, expected)
