"""Networks redrawn from graphons: what they have of the original, how they train, what is refused."""

import copy
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_graphon.dynamics import extrapolate_widths, redraw_from_graphons, sibling_optimizer
from lightning_graphon.dynamics.predictors.cell_draws import cells_of, narrowed_variance, units_of_bins
from lightning_graphon.dynamics.predictors.width_scaling import optimizer_kind, rate_factor
from lightning_graphon.graphon import layer_graphons
from lightning_graphon.graphon.estimation.layers import joint_labels
from lightning_graphon.ntk import empirical_ntk
from lightning_graphon.pruning import Masks, prune


def mlp(*sides, bias=True, seed=0):
    torch.manual_seed(seed)
    hidden = [m for a, b in pairwise(sides[:-1]) for m in (nn.Linear(a, b, bias=bias), nn.ReLU())]
    net = nn.Sequential(*hidden, nn.Linear(*sides[-2:], bias=bias))
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight)
        if bias:
            nn.init.normal_(layer.bias, std=0.3)
    return net


def pruned(net, method="synflow", sparsity=0.8):
    masks = prune(net, method, sparsity=sparsity, batches=[(torch.randn(8, net[0].in_features), torch.zeros(8).long())])
    masks.apply_(net)
    return net, masks


@pytest.fixture(scope="module")
def wide():
    return pruned(mlp(12, 48, 48, 5))


# ---- what is drawn


@pytest.mark.parametrize("fields", ["WED", "WE", "W"])
def test_cells_have_the_density_second_moment_and_mean_of_the_original(wide, fields):
    """Summed over all cells of a bin of rows, so that few weights do not hide an error."""
    net, masks = wide
    count = 80
    drawn = [redraw_from_graphons(net, masks, bins=4, seed=seed, fields=fields).model for seed in range(count)]
    graphons = layer_graphons(masks, model=net, bins=4, order="joint")
    for (name, graphon), rows, cell in zip(
        graphons.items(), row_bins(net, masks, bins=4), cells(net, masks, fields), strict=True
    ):
        weights = torch.stack([m.get_parameter(name).detach() for m in drawn]).double()
        mean, variance = cell.mean, cell.variance
        expected = {"W": graphon.values, "E": graphon.values * (mean**2 + variance), "D": graphon.values * mean}
        for key, values in {"W": (weights != 0).double(), "E": weights**2, "D": weights}.items():
            # Rows of the new network are in the order of their bins, at width 1 as many as in the original.
            by_bin = torch.stack([values[:, rows == k].mean((1, 2)) for k in range(len(graphon.row_measure))], 1)
            target = (expected[key] * graphon.col_measure).sum(1)
            error = by_bin.std(0) / count**0.5 + 1e-12
            # 4 standard errors: one in 16,000 would be farther by chance, and there are some 30 numbers.
            assert ((by_bin.mean(0) - target).abs() < 4 * error).all(), (name, key)


def row_bins(net, masks, bins):
    """Bin of each row of a redrawn network of the same width: in their order."""
    return [label.sort().values for label in joint_labels(masks, model=net, bins=bins)] + [torch.arange(5)]


def cells(net, masks, fields):
    """Cells of every layer, by the bins of layer_graphons."""
    labels = [torch.arange(12), *joint_labels(masks, model=net, bins=4), torch.arange(5)]
    return [
        cells_of(mask, net.get_parameter(name), rows, columns, fields)
        for (name, mask), (columns, rows) in zip(masks.items(), pairwise(labels), strict=True)
    ]


def test_all_fields_keep_the_cells_of_the_original(wide):
    net, masks = wide
    graphon = list(layer_graphons(masks, model=net, bins=4, order="joint").values())[1]
    cell = cells(net, masks, "WED")[1]
    mean, variance = cell.mean, cell.variance
    torch.testing.assert_close(cell.density, graphon.values)
    torch.testing.assert_close(graphon.values * mean, graphon.drift)
    torch.testing.assert_close(graphon.values * (mean**2 + variance), graphon.energy)


def test_without_the_fields_weights_have_the_mean_and_variance_of_the_layer(wide):
    net, masks = wide
    name = "2.weight"
    graphon = layer_graphons(masks, model=net, bins=4, order="joint")[name]
    kept = net.get_parameter(name).detach()[masks[name]].double()
    _, cell, _ = cells(net, masks, "W")
    mean, variance = cell.mean, cell.variance
    torch.testing.assert_close(mean, kept.mean().expand_as(mean))
    torch.testing.assert_close(variance, kept.var(correction=0).expand_as(mean))
    _, cell, _ = cells(net, masks, "WE")
    mean, variance = cell.mean, cell.variance
    assert not mean.any()
    torch.testing.assert_close(graphon.values * variance, graphon.energy)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 2.0])
def test_the_variance_of_a_sum_is_that_of_the_wide_network(ratio):
    density, mean, variance = torch.tensor(0.3), torch.tensor(0.5), torch.tensor(2.0)
    inputs = 64
    wide_sum = inputs * (density * variance + density * (1 - density) * mean**2)
    narrow = narrowed_variance(density, mean, variance, ratio)
    narrow_sum = ratio * inputs * (density * narrow + density * (1 - density) * (mean / ratio) ** 2)
    torch.testing.assert_close(narrow_sum, wide_sum)


def test_no_variance_is_left_where_the_mask_alone_has_too_much():
    assert narrowed_variance(torch.tensor(0.1), torch.tensor(1.0), torch.tensor(0.0), 0.5) == 0


@pytest.mark.parametrize("width", [0.5, 1.0, 1.5])
def test_dense_masks_give_dense_siblings(width):
    net = mlp(6, 16, 16, 3)
    masks = {name: torch.ones_like(p).bool() for name, p in net.named_parameters() if p.ndim == 2}
    sibling = redraw_from_graphons(net, masks, width=width)
    assert all(mask.all() for mask in sibling.masks.values())
    assert all((p != 0).all() for p in sibling.model.parameters() if p.ndim == 2)
    assert [layer.out_features for layer in sibling.model[::2]] == [int(16 * width), int(16 * width), 3]


def test_mup_scales_the_fluctuations_of_the_last_layer_only():
    net, ratio = mlp(6, 64, 64, 3), 0.25
    masks = {name: torch.ones_like(p).bool() for name, p in net.named_parameters() if p.ndim == 2}
    ntk, mup = (redraw_from_graphons(net, masks, width=ratio, scaling=s, bins=1).model for s in ("ntk", "mup"))
    assert torch.equal(ntk[0].weight, mup[0].weight)
    assert torch.equal(ntk[2].weight, mup[2].weight)
    means = net[4].weight.mean(1, keepdim=True) / ratio  # of one bin, dense
    # s / r in place of s / √r, of the same random numbers; float32.
    torch.testing.assert_close(mup[4].weight - means, (ntk[4].weight - means) * ratio**-0.5, rtol=1e-4, atol=1e-6)


def test_inputs_and_outputs_keep_their_identity():
    net, masks = mlp(6, 64, 4), {}
    masks["0.weight"] = torch.zeros(64, 6).bool()
    masks["0.weight"][:, 2] = True
    masks["2.weight"] = torch.zeros(4, 64).bool()
    masks["2.weight"][1] = True
    Masks(masks).apply_(net)
    for width in (1.0, 0.25):
        drawn = redraw_from_graphons(net, masks, width=width)
        assert drawn.masks["0.weight"].any(0).tolist() == [False, False, True, False, False, False]
        assert drawn.masks["2.weight"].any(1).tolist() == [False, True, False, False]
        assert torch.equal(drawn.model[2].bias, net[2].bias)


def test_weights_are_where_masks_are(wide):
    net, masks = wide
    for fields in ("WED", "WE", "W", "degrees"):
        drawn = redraw_from_graphons(net, masks, fields=fields)
        for name, mask in drawn.masks.items():
            assert torch.equal(drawn.model.get_parameter(name) != 0, mask)


def test_unmasked_layers_stay_dense(wide):
    net, masks = wide
    first = next(iter(masks))
    drawn = redraw_from_graphons(net, {first: masks[first]}, width=0.5)
    assert list(drawn.masks) == [first]
    assert (drawn.model[4].weight != 0).all()  # zeros that no mask explains are weights as others


def test_degrees_are_kept_and_their_joint_order_is_not(wide):
    net, masks = wide
    drawn = redraw_from_graphons(net, masks, fields="degrees")
    for name, mask in masks.items():
        new = drawn.masks[name]
        assert torch.equal(new.sum(1).sort().values, mask.sum(1).sort().values)
        assert torch.equal(new.sum(0), mask.sum(0))
        assert not torch.equal(new, mask)
        # Outputs keep their identity, and hidden neurons are in another order than the next mask's columns.
        assert torch.equal(new.sum(1), mask.sum(1)) == (name == "4.weight")
        kept = net.get_parameter(name).detach()[mask]
        assert torch.equal(drawn.model.get_parameter(name).detach()[new].sort().values, kept.sort().values)


def test_biases_and_norms_are_those_of_a_neuron_of_the_bin():
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].bias.copy_(torch.arange(8.0))
        net[1].weight.copy_(torch.arange(8.0) + 10)
        net[1].running_var.copy_(torch.arange(8.0) + 20)
        net[3].bias.copy_(torch.arange(8.0) + 40)
    mask = torch.ones(8, 3).bool()
    mask[4:, 0] = False
    twin = redraw_from_graphons(net, {"0.weight": mask}, width=0.5).model.eval()
    bias = twin[0].bias
    assert (bias < 4).sum() == (bias >= 4).sum() == 2  # two bins of four neurons
    assert torch.equal((twin[0].weight[:, 0] != 0), bias < 4)
    for part, start in ((twin[1].weight, 10), (twin[1].running_var, 20), (twin[3].bias, 40)):
        assert torch.equal(part, bias + start)
    assert twin(torch.randn(5, 3)).shape == (5, 2)


@pytest.mark.parametrize("count", [3, 10, 40])
def test_every_neuron_has_the_same_chance(count):
    """Also with more bins than new neurons."""
    label = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 5, 5])
    source, rounds = torch.Generator().manual_seed(0), 4000
    hits = torch.stack(
        [torch.bincount(units_of_bins(label, count, source), minlength=10) for _ in range(rounds)]
    ).double()
    error = hits.std(0) / rounds**0.5
    assert ((hits.mean(0) - count / 10).abs() <= 4 * error).all()  # 4 standard errors of ten numbers


def test_bins_that_fit_get_exactly_their_share():
    label = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])
    for count in (4, 8, 16):
        drawn = label[units_of_bins(label, count, torch.Generator().manual_seed(1))]
        assert torch.bincount(drawn).tolist() == [count // 4, count // 2, count // 4]


# ---- convolutions, residual streams, gates


class ResidualCNN(nn.Module):
    def __init__(self, channels=32):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 48, 3, padding=1, bias=False)
        self.norm, self.second = nn.BatchNorm2d(48), nn.Conv2d(48, channels, 1)
        self.scale, self.head = (
            nn.Parameter(torch.linspace(0.5, 1, channels)[:, None, None]),
            nn.Linear(channels * 4, 5),
        )

    def forward(self, x):
        x = self.stem(x)
        x = x + self.scale * self.second(F.relu(self.norm(self.first(x))))
        return self.head(F.avg_pool2d(x.relu(), 3).flatten(1))


class Gated(nn.Module):
    """A residual stream of tokens, gated branches and a learned position."""

    def __init__(self):
        super().__init__()
        self.words, self.position = nn.Embedding(10, 16), nn.Parameter(torch.randn(1, 4, 16))
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.words(x) + self.position
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        return self.head((x + self.down(F.silu(gate) * value)).mean(1))


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    net, x = ResidualCNN(), torch.randn(6, 3, 6, 6)
    masks = prune(net, "synflow", sparsity=0.7, batches=[(x, torch.zeros(6).long())])
    masks.apply_(net)
    return net, masks, x


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_a_residual_network_has_one_width_for_its_stream(residual, width):
    net, masks, x = residual
    drawn = redraw_from_graphons(net, masks, inputs=x, width=width, bins=4)
    twin, stream, inner = drawn.model, int(32 * width), int(48 * width)
    assert twin(x).shape == (6, 5)
    assert (twin.stem.out_channels, twin.first.in_channels, twin.second.out_channels) == (stream, stream, stream)
    assert (twin.first.out_channels, twin.norm.num_features, twin.head.in_features) == (inner, inner, stream * 4)
    assert twin.scale.shape == (stream, 1, 1)
    assert set(twin.scale.flatten().tolist()) <= set(net.scale.flatten().tolist())
    assert set(twin.stem.bias.tolist()) <= set(net.stem.bias.tolist())
    # Every block has the same neuron at the same place.
    places = [net.scale.flatten().tolist().index(s) for s in twin.scale.flatten().tolist()]
    assert torch.equal(twin.stem.bias, net.stem.bias[places])
    assert torch.equal(twin.second.bias, net.second.bias[places])
    for name, mask in drawn.masks.items():
        assert torch.equal(mask, twin.get_parameter(name) != 0)
        # A mean over some thousand draws; the smallest layer keeps about 600 x 0.3 of them.
        assert mask.float().mean().item() == pytest.approx(masks[name].float().mean().item(), abs=0.06)
    assert drawn.ratios["first.weight"] == (width, width)
    assert drawn.ratios["head.weight"] == (width, 1)
    assert drawn.ratios["scale"] == (1, width)


def test_taps_are_drawn_apart():
    """A mask that keeps the centre only, and weights of another size at each tap."""
    net = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    mask = torch.zeros(64, 64, 3, 3).bool()
    mask[..., 1, 1] = True
    with torch.no_grad():
        net[2].weight.copy_(torch.randn(64, 64, 3, 3))
        net[0].weight.copy_(torch.randn(64, 1, 3, 3) * torch.linspace(0.1, 1, 9).view(3, 3))
    drawn = redraw_from_graphons(net, {"2.weight": mask}, inputs=torch.randn(2, 1, 5, 5), width=0.5, bins=1)
    assert drawn.masks["2.weight"][..., 1, 1].all()
    assert drawn.masks["2.weight"].sum() == 32 * 32
    sizes = drawn.model[0].weight.detach().square().mean((0, 1)).sqrt().flatten()
    # 32 draws of each: standard error 0.125 of the size.
    torch.testing.assert_close(sizes, torch.linspace(0.1, 1, 9), rtol=0.5, atol=0)


@pytest.mark.parametrize("tokens_first", [False, True])
def test_flattened_channels_and_tokens_keep_their_position(tokens_first):
    """Weights of the last layer know the position that they read."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(2, 32, 1), nn.Linear(32 * 3, 2)

        def forward(self, x):
            x = self.conv(x)
            return self.head((x.transpose(1, 2) if tokens_first else x).flatten(1))

    net, position = Net(), torch.tensor([1.0, 10.0, 100.0])
    with torch.no_grad():
        net.head.weight.copy_((position.repeat_interleave(32) if tokens_first else position.repeat(32)).expand(2, -1))
    x = torch.randn(2, 2, 3)
    twin = redraw_from_graphons(net, {}, inputs=x, width=0.5).model
    expected = position.repeat_interleave(16) if tokens_first else position.repeat(16)
    torch.testing.assert_close(twin.head.weight.detach(), 2 * expected.expand(2, -1))  # m / r


def test_gates_and_embeddings_follow_the_stream():
    net, x = Gated(), torch.randint(10, (3, 4))
    masks = {"up.weight": torch.rand(48, 16) < 0.5}
    Masks(masks).apply_(net)
    for width in (0.5, 1.0):
        drawn = redraw_from_graphons(net, masks, inputs=x, width=width)
        assert drawn.model(x).shape == (3, 3)
        assert drawn.model.words.weight.shape == (10, 16 * width)
        assert drawn.model.up.weight.shape == (48 * width, 16 * width)
        assert drawn.model.down.in_features == 24 * width
        first = drawn.model.words.weight[0].tolist()
        places = [net.words.weight[0].tolist().index(value) for value in first]
        assert torch.equal(drawn.model.position, net.position[..., places])


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 8, 3), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.conv(x).view(-1, 16))


def test_sizes_in_the_forward_are_refused_at_another_width_only():
    net, x = Fixed(), torch.randn(2, 1, 4)
    assert redraw_from_graphons(net, {}, inputs=x).model(x).shape == (2, 2)
    with pytest.raises(ValueError, match="holds sizes as numbers"):
        redraw_from_graphons(net, {}, inputs=x, width=0.5)


@pytest.mark.parametrize(
    ("net", "inputs", "words"),
    [
        (nn.MultiheadAttention(4, 2, batch_first=True), None, "pass inputs="),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8), "attention"),
        (nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), torch.randn(2, 4, 3), "groups"),
        (nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 5), "does not run on samples of shape .5,."),
    ],
)
def test_units_that_belong_together_are_refused(net, inputs, words):
    with pytest.raises(ValueError, match=words):
        redraw_from_graphons(net, {}, inputs=inputs)


# ---- limits of what may be asked


def test_dead_units_and_empty_masks_are_drawn(wide):
    net, masks = copy.deepcopy(wide[0]), dict(wide[1])
    masks["0.weight"] = masks["0.weight"].clone()
    masks["0.weight"][:10] = False
    masks["4.weight"] = torch.zeros_like(masks["4.weight"])
    drawn = redraw_from_graphons(net, masks, width=0.5)
    assert not drawn.masks["4.weight"].any()
    assert all(p.isfinite().all() for p in drawn.model.parameters())
    assert (~drawn.masks["0.weight"].any(1)).sum() >= 4  # 10 of 48 dead, of 24


def test_more_bins_than_units_no_biases_and_one_unit():
    net, masks = pruned(mlp(12, 32, 32, 5, bias=False))
    drawn = redraw_from_graphons(net, masks, width=1 / 16, bins=1000)
    assert [layer.out_features for layer in drawn.model[::2]] == [2, 2, 5]
    assert drawn.model[0].bias is None
    assert redraw_from_graphons(net, masks, width=1e-3).model[0].out_features == 1


def test_a_seed_gives_one_network_and_the_global_numbers_are_left(wide):
    net, masks = wide
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    first, again, other = (redraw_from_graphons(net, masks, width=0.5, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    assert first.masks == again.masks
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert first.masks != other.masks


def test_dtype_frozen_flags_and_mode_are_kept():
    net = mlp(4, 8, 2).double().eval()
    net[0].weight.requires_grad_(False)
    twin = redraw_from_graphons(net, {"0.weight": torch.eye(8, 4).bool()}, width=0.5).model
    assert twin[0].weight.dtype == torch.float64
    assert not twin[0].weight.requires_grad
    assert twin[2].weight.requires_grad
    assert not twin.training


class Custom(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = F.dropout(F.relu(self.fc1(x.flatten(1))), 0.1, self.training)
        return self.head(torch.tanh(self.fc2(x) * 0.5)) + 1

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_lightning_module_with_its_own_forward():
    module = Custom()
    drawn = redraw_from_graphons(module, {"fc2.weight": torch.rand(16, 16) < 0.3}, width=0.25)
    assert type(drawn.model) is Custom
    assert drawn.model.fc2.weight.shape == (4, 4)
    batch = (torch.randn(5, 2, 2), torch.tensor([0, 1, 2, 0, 1]))
    drawn.model.training_step(batch, 0).backward()
    assert drawn.rates("adam")["fc2.weight"] == pytest.approx(0.25**-1.5)


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.MaxPool1d(2)), "layer '2' .MaxPool1d."),
        (nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 2)), "layer '1' .PReLU."),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2)), "layer '1' .Softmax."),
        (nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)), "layer '1' .GroupNorm."),
        (tied(), "layer '2' .Linear., which shares its weight with layer '0'"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), "begins with a Conv2d: pass inputs="),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
            "layer '0'|weight_norm|parametrizations",
        ),
        (nn.ReLU(), "no Linear layer"),
    ],
)
def test_what_is_no_chain_is_refused_by_name(net, words):
    with pytest.raises(ValueError, match=words):
        redraw_from_graphons(net, {"0.weight": torch.ones(4, 4).bool()})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 0.0}, "width"),
        ({"width": float("nan")}, "width"),
        ({"fields": "E"}, "fields"),
        ({"scaling": "standard"}, "scaling"),
        ({"fields": "degrees", "width": 0.5}, "degrees"),
        ({"bins": 0}, "bins"),
    ],
)
def test_arguments_out_of_range_are_refused(wide, arguments, words):
    with pytest.raises(ValueError, match=words):
        redraw_from_graphons(*wide, **arguments)


def test_masks_of_another_network_are_refused(wide):
    with pytest.raises(ValueError, match="'1.weight' is of no weight"):
        redraw_from_graphons(wide[0], {"1.weight": torch.ones(2, 2).bool()})
    with pytest.raises(ValueError, match="shape"):
        redraw_from_graphons(wide[0], {"0.weight": torch.ones(2, 2).bool()})
    net = mlp(4, 8, 2)
    net[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '2' .Linear. has parameters that are not finite"):
        redraw_from_graphons(net, {"0.weight": torch.ones(8, 4).bool()})


# ---- learning rates


def test_the_table_of_factors():
    """Of prediction.md: (input, hidden, output), then biases of a hidden and of the output layer."""
    r = 0.25
    sides = [(1, r), (r, r), (r, 1), (1, r), (1, 1)]
    table = {
        ("mup", "sgd"): [r, 1, 1 / r, r, 1],
        ("mup", "adam"): [1, 1 / r, 1 / r, 1, 1],
        ("ntk", "sgd"): [1, 1 / r, 1 / r, 1, 1],
        ("ntk", "adam"): [r**-0.5, r**-1.5, 1 / r, r**-0.5, 1],
    }
    for (scaling, kind), expected in table.items():
        assert [rate_factor(a, b, kind, scaling) for a, b in sides] == pytest.approx(expected)


def test_the_optimizer_is_the_users_own_with_split_groups(wide):
    net, masks = wide
    drawn = redraw_from_graphons(net, masks, width=0.25)
    groups = [{"params": net[0].parameters(), "lr": 0.01}, {"params": net[2:].parameters(), "weight_decay": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.5, 0.9), weight_decay=0.2)
    new = sibling_optimizer(optimizer, net, drawn)
    assert type(new) is torch.optim.AdamW
    names = {id(p): name for name, p in drawn.model.named_parameters()}
    found = {names[id(p)]: g for g in new.param_groups for p in g["params"]}
    assert found.keys() == names_of(net)
    rates = drawn.rates("adam")
    for name, group in found.items():
        lr, decay = (0.01, 0.2) if name.startswith("0.") else (0.1, 0.5)
        assert group["betas"] == (0.5, 0.9)
        assert group["lr"] == pytest.approx(lr * rates[name])
        assert group["lr"] * group["weight_decay"] == pytest.approx(lr * decay)


def names_of(net):
    return dict(net.named_parameters()).keys()


def test_decay_in_adams_gradient_keeps_its_share(wide):
    net, masks = wide
    drawn = redraw_from_graphons(net, masks, width=0.25)
    new = sibling_optimizer(torch.optim.Adam(net.parameters(), weight_decay=0.1), net, drawn)
    names = {id(p): name for name, p in drawn.model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in new.param_groups for p in g["params"]}
    assert [decay[f"{i}.weight"] for i in (0, 2, 4)] == pytest.approx([0.2, 0.1, 0.05])


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, weight_decay=0.0, factor=None):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "factor": factor})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                sign = p.grad.sign() if group["factor"] is None else p.grad * p.grad.abs() ** group["factor"]
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * sign)


@pytest.mark.parametrize(("factor", "kind"), [(None, "adam"), (0.0, "sgd")])
def test_other_optimizers_are_asked(factor, kind):
    optimizer = Lion([torch.zeros(2, requires_grad=True)], weight_decay=0.1, factor=factor)
    assert optimizer_kind(optimizer) == kind


def test_optimizers_that_cannot_be_scaled_are_refused(wide):
    net, masks = wide
    drawn = redraw_from_graphons(net, masks)
    for optimizer, words in [
        (torch.optim.LBFGS(net.parameters()), "LBFGS"),
        (Lion(net.parameters(), factor=1.0), "neither like SGD"),
        (torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=1), "not the model's"),
    ]:
        with pytest.raises(ValueError, match=words):
            sibling_optimizer(optimizer, net, drawn)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 12)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="state"):
        sibling_optimizer(optimizer, net, drawn)
    net.zero_grad()


@pytest.mark.parametrize("scaling", ["ntk", "mup"])
def test_clipping_is_in_a_norm_that_knows_the_width(scaling):
    net = mlp(4, 16, 2)
    drawn = redraw_from_graphons(net, {"0.weight": torch.rand(16, 4) < 0.5}, width=0.5, scaling=scaling)
    assert drawn.gradient_norm() == 0
    drawn.model(torch.randn(3, 4)).square().sum().backward()
    rates = drawn.rates("sgd")
    expected = sum(rates[n] * p.grad.double().square().sum() for n, p in drawn.model.named_parameters()).sqrt()
    torch.testing.assert_close(drawn.clip_grad_norm_(0.1), expected)
    torch.testing.assert_close(drawn.gradient_norm().item(), 0.1, rtol=1e-3, atol=0)


# ---- kernels and training


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_kernels_at_initialisation_are_those_of_the_wide_network(width):
    """The wide network is one draw itself, so its kernel is as far from the mean as that of a sibling."""
    net, masks = pruned(mlp(12, 256, 256, 5), "random", 0.7)
    x = torch.randn(6, 12)
    x = x / x.norm(dim=1, keepdim=True)
    kernel = empirical_ntk(net, x, masks=masks)
    drawn = [redraw_from_graphons(net, masks, width=width, seed=seed) for seed in range(24)]
    kernels = torch.stack([scaled_kernel(d, x) for d in drawn])
    spread = kernels.std(0) * (1 / 24 + 1 / (1 if width == 1 else 2)) ** 0.5
    # 4 standard deviations; 21 numbers that hang together. A narrower sibling's spread is that of its own width.
    assert ((kernels.mean(0) - kernel).abs() < 4 * spread).all()
    assert (spread < 0.25 * kernel.diagonal().mean()).all()  # so that the test can fail


def scaled_kernel(drawn, x):
    rates = drawn.rates("sgd")
    scale = {n: torch.full_like(p, rates[n]) for n, p in drawn.model.named_parameters()}
    return empirical_ntk(drawn.model, x, masks=drawn.masks, preconditioner=scale)


def test_a_narrow_network_without_factors_has_another_kernel():
    """Factors bring the trace back from where the width has taken it."""
    net, masks = pruned(mlp(12, 256, 256, 5), "random", 0.7)
    x = torch.randn(6, 12)
    # One bin, as random masks need: means of cells of few weights are chance, which a narrow network makes larger.
    drawn = [redraw_from_graphons(net, masks, width=0.25, seed=seed, bins=1) for seed in range(4)]
    plain = sum(empirical_ntk(d.model, x, masks=d.masks).trace() for d in drawn) / 4
    scaled = sum(scaled_kernel(d, x).trace() for d in drawn) / 4
    trace = empirical_ntk(net, x, masks=masks).trace()
    assert abs(scaled - trace) < 0.33 * abs(plain - trace)


def train(net, optimizer, x, y, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_narrow_dense_network_in_the_lazy_regime_has_the_curve_of_the_wide_one(optimizer):
    """Targets far larger than the outputs, so that chance at the start does not matter; steps that hardly move it."""
    net = mlp(8, 1024, 1024, 1, bias=False)
    masks = {name: torch.ones_like(p).bool() for name, p in net.named_parameters()}
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    x = x / x.norm(dim=1, keepdim=True)
    y = 10 * x[:, :1] + 20 * x[:, 1:2].square()
    lr = 1.5e-4 if optimizer is torch.optim.SGD else 2e-5
    steps = 30
    curves, plain = [], []
    for seed in range(4):
        drawn = redraw_from_graphons(net, masks, width=0.25, seed=seed)
        other = copy.deepcopy(drawn.model)
        scaled = sibling_optimizer(optimizer(net.parameters(), lr=lr), net, drawn)
        curves.append(train(drawn.model, scaled, x, y, steps))
        plain.append(train(other, optimizer(other.parameters(), lr=lr), x, y, steps))
    wide_net = copy.deepcopy(net)
    wide_curve = train(wide_net, optimizer(wide_net.parameters(), lr=lr), x, y, steps)
    assert wide_curve[-1] < 0.6 * wide_curve[0]  # something is learnt
    error = (torch.stack(curves).log().mean(0) - wide_curve.log()).abs().median()
    error_plain = (torch.stack(plain).log().mean(0) - wide_curve.log()).abs().median()
    # Kernels of width 256 are off by about 1/√256 a draw, 3 % of four; what is learnt is a factor of two.
    assert error < 0.05
    assert error_plain > 3 * error


# ---- two widths


def test_extrapolation_removes_a_bias_of_one_over_the_width():
    true, bias = torch.rand(20).double() + 0.1, torch.randn(20).double()
    at = {r: (true.log() + bias * (1 / r - 1)).exp() for r in (0.5, 0.25, 0.125)}
    torch.testing.assert_close(extrapolate_widths(at[0.25], at[0.125]), true)
    torch.testing.assert_close(extrapolate_widths(at[0.5], at[0.125], (0.5, 0.125)), true)


def test_extrapolation_of_zeros_and_of_what_diverged_is_no_nan():
    wider = torch.tensor([0.0, 1.0, torch.inf, torch.nan, 0.0, 1e30])
    narrower = torch.tensor([0.0, torch.inf, torch.inf, 1.0, 1.0, 1e-30])
    found = extrapolate_widths(wider, narrower)
    assert found.dtype == torch.float64
    assert not found.isnan().any()
    assert found.isinf().tolist() == [False, True, True, True, False, False]
    assert found[0] == pytest.approx(0, abs=1e-300)


@pytest.mark.parametrize("ratios", [(0.125, 0.25), (0.25, 0.25), (0.5, 0.0)])
def test_ratios_that_do_not_fall_are_refused(ratios):
    with pytest.raises(ValueError, match="ratios"):
        extrapolate_widths(torch.ones(2), torch.ones(2), ratios)
    with pytest.raises(ValueError, match="shape"):
        extrapolate_widths(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="negative"):
        extrapolate_widths(-torch.ones(2), torch.ones(2))
