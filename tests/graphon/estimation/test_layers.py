from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from lightning_graphon.graphon import StepGraphon, block, constant, estimate_graphon, layer_graphons, power_law, product
from lightning_graphon.graphon.estimation.joint_positions import nested_quantile_labels, quantile_labels


def chain(*widths, density=0.3, seed=0):
    """Uneven masks of a multilayer perceptron by name, input side first."""
    shape = product(density)
    names = [f"{2 * k}.weight" for k in range(len(widths) - 1)]
    pairs = zip(names, pairwise(widths), strict=True)
    return {name: shape.sample((b, a), seed=seed + k) for k, (name, (a, b)) in enumerate(pairs)}


def mlp(*widths, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def relabelled(masks, model, seed):
    """The same network with its hidden neurons in another order."""
    g = torch.Generator().manual_seed(seed)
    names, new_masks, before = list(masks), {}, None
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for index, name in enumerate(names):
        rows = torch.arange(masks[name].shape[0])
        if index + 1 < len(names):
            rows = rows[torch.randperm(len(rows), generator=g)]
        cols = torch.arange(masks[name].shape[1]) if before is None else before
        new_masks[name], state[name] = masks[name][rows][:, cols], state[name][rows][:, cols]
        before = rows
    twin = mlp(masks[names[0]].shape[1], *[m.shape[0] for m in masks.values()])
    twin.load_state_dict(state)
    return new_masks, twin


POSITIONS = ["degree", "energy", "spectral"]


def test_each_mask_for_itself_is_its_own_estimate_in_network_order():
    masks = chain(20, 30, 25, 4)
    for order in ("degree", "none"):
        found = layer_graphons(masks, bins=8, order=order)
        assert list(found) == list(masks)
        assert all(found[name] == estimate_graphon(mask, 8, order) for name, mask in masks.items())


@pytest.mark.parametrize("positions", POSITIONS)
def test_consecutive_graphons_share_a_partition_and_the_ends_keep_their_identity(positions):
    masks, model = chain(20, 100, 90, 80, 4), mlp(20, 100, 90, 80, 4)
    found = list(layer_graphons(masks, model=model, bins=16, order="joint", positions=positions).values())
    for before, after in pairwise(found):
        assert torch.equal(before.row_measure, after.col_measure)
        assert 8 <= before.shape[0] <= 16
    assert found[0].shape[1] == 20
    assert found[-1].shape[0] == 4
    for graphon, mask in zip(found, masks.values(), strict=True):
        assert graphon.density == pytest.approx(mask.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("positions", POSITIONS)
def test_hidden_neurons_may_come_in_any_order(positions):
    masks, model = chain(20, 60, 50, 4), mlp(20, 60, 50, 4)
    other_masks, other_model = relabelled(masks, model, seed=1)
    first = layer_graphons(masks, model=model, bins=16, order="joint", positions=positions)
    second = layer_graphons(other_masks, model=other_model, bins=16, order="joint", positions=positions)
    for name in masks:
        torch.testing.assert_close(first[name].values, second[name].values, rtol=0, atol=1e-12)
        torch.testing.assert_close(first[name].energy, second[name].energy, rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", ["degree", "spectral"])
@pytest.mark.parametrize("graphon", [constant(0.05), constant(0.3), block([[0.6, 0.1], [0.1, 0.5]])])
def test_neurons_of_small_sparse_masks_may_come_in_any_order(graphon, positions):
    # Their singular values are few, equal or noise: vectors that belong to them are not the network's own.
    for seed in range(10):
        masks = {
            f"{2 * k}.weight": graphon.sample(s, seed=seed + k) for k, s in enumerate([(27, 3), (23, 27), (17, 23)])
        }
        other, _ = relabelled(masks, mlp(3, 27, 23, 17), seed)
        first, second = (layer_graphons(m, bins=16, order="joint", positions=positions) for m in (masks, other))
        for name in masks:
            torch.testing.assert_close(first[name].values, second[name].values, rtol=0, atol=1e-12)


def test_neurons_that_a_symmetry_exchanges_share_a_bin():
    # Two equal blocks: any two directions in the plane of their vectors are singular vectors.
    masks = {"a": torch.block_diag(*[torch.ones(16, 10)] * 2).bool(), "b": torch.ones(2, 32).bool()}
    assert layer_graphons(masks, bins=2, order="joint", positions="spectral")["a"].shape == (1, 20)
    # Two equal gaps: the second vector is 1 at one of them and -1 at the other, or the reverse.
    masks = {"a": torch.ones(5, 9).bool(), "b": torch.ones(2, 5).bool()}
    masks["a"][1, 2] = masks["a"][4, 6] = False
    first = layer_graphons(masks, bins=16, order="joint", positions="spectral")
    second = layer_graphons({**masks, "a": masks["a"].flip(0)}, bins=16, order="joint", positions="spectral")
    assert first["a"].row_measure.tolist() == pytest.approx([0.4, 0.6])
    torch.testing.assert_close(first["a"].values, second["a"].values, rtol=0, atol=1e-12)


def test_one_bin_per_neuron_gives_back_the_network():
    # degrees are all different, so quantiles separate all neurons: path counts are those of the masks
    masks = {"a": torch.ones(6, 6).tril().bool(), "b": torch.ones(3, 6).bool()}
    found = layer_graphons(masks, bins=36, order="joint")
    assert found["a"].shape == (6, 6)
    assert torch.equal(found["a"].values.flip(0), masks["a"].double())  # largest degree first


def test_a_dense_network_needs_one_bin_per_layer():
    masks = {"a": torch.ones(8, 3).bool(), "b": torch.ones(2, 8).bool()}
    found = layer_graphons(masks, order="joint")
    assert found["a"].shape == (1, 3)
    assert found["b"].shape == (2, 1)


def test_joint_cells_are_means_over_the_neurons_of_a_bin():
    masks = chain(5, 40, 3)
    first, second = masks.values()
    label = nested_quantile_labels(first.sum(1).double(), second.sum(0).double(), 9)
    found = layer_graphons(masks, bins=9, order="joint")
    for index in range(int(label.max()) + 1):
        torch.testing.assert_close(found["0.weight"].values[index], first[label == index].double().mean(0))
        torch.testing.assert_close(found["2.weight"].values[:, index], second[:, label == index].double().mean(1))


@pytest.mark.parametrize("order", ["degree", "none", "joint"])
def test_energy_and_drift_are_means_of_the_kept_weights(order):
    masks, model = chain(12, 30, 20, 3), mlp(12, 30, 20, 3)
    for name, graphon in layer_graphons(masks, model=model, bins=6, order=order).items():
        kept = model.get_parameter(name).detach().double() * masks[name]
        weight = graphon.row_measure[:, None] * graphon.col_measure
        assert (graphon.energy * weight).sum().item() == pytest.approx((kept**2).mean().item(), rel=1e-9)
        assert (graphon.drift * weight).sum().item() == pytest.approx(kept.mean().item(), rel=1e-9)
        without = layer_graphons(masks, model=model, bins=6, order=order, drift=False)[name]
        assert without.drift is None
        assert torch.equal(without.energy, graphon.energy)
    # with one bin per entry they are the entries
    full = layer_graphons(masks, model=model, bins=64, order="none")["0.weight"]
    torch.testing.assert_close(full.energy, (model[0].weight.detach().double() * masks["0.weight"]) ** 2)


def test_energy_positions_see_weights_where_degrees_are_equal():
    masks = {"0.weight": torch.ones(40, 5).bool(), "2.weight": torch.ones(2, 40).bool()}
    model = mlp(5, 40, 2)
    with torch.no_grad():
        model[0].weight[:20] *= 10
    by_degree = layer_graphons(masks, model=model, bins=4, order="joint")["0.weight"]
    by_energy = layer_graphons(masks, model=model, bins=4, order="joint", positions="energy")["0.weight"]
    assert by_degree.shape[0] == 1
    assert by_energy.shape[0] == 4
    strong, weak = by_energy.energy[:2].mean(), by_energy.energy[2:].mean()
    assert strong / weak == pytest.approx(100, rel=0.5)  # 100 weights a cell: 14 % error each, and selection


def test_spectral_positions_find_blocks_that_degrees_cannot_see():
    g = torch.Generator().manual_seed(0)
    side = torch.randperm(64, generator=g) % 2
    p = torch.where(side[:, None] == torch.arange(40) % 2, 0.8, 0.2)
    first = torch.rand(64, 40, generator=g) < p
    masks = {"a": first, "b": torch.ones(2, 64).bool()}
    spread = {
        kind: layer_graphons(masks, bins=4, order="joint", positions=kind)["a"].values.var().item()
        for kind in ("degree", "spectral")
    }
    # the planted means 0.8 and 0.2 have variance 0.09; mixed halves would leave the sampling noise of 0.016
    assert spread["spectral"] > 0.07 > 2 * spread["degree"]


def test_wide_identity_axes_are_not_binned():
    masks = {"a": torch.rand(4, 300, generator=torch.Generator().manual_seed(0)) < 0.5}
    found = layer_graphons(masks, order="joint")["a"]
    assert torch.equal(found.values, masks["a"].double())


# ---- convolutions


def small_cnn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 9, 5))


def cnn_masks(model, density=0.6):
    g = torch.Generator().manual_seed(0)
    shapes = {n: p.shape for n, p in model.named_parameters() if n.endswith("weight")}
    return {n: torch.rand(s, generator=g) < density for n, s in shapes.items()}


def test_convolutions_flattened_into_a_linear_layer_are_a_chain():
    model = small_cnn()
    masks = cnn_masks(model)
    found = layer_graphons(masks, model=model, bins=64, order="joint")
    conv, grouped, linear = found.values()
    assert conv.shape[1] == 2
    assert linear.shape[0] == 5
    assert torch.equal(grouped.row_measure, linear.col_measure)
    assert conv.density == pytest.approx(masks["0.weight"].double().mean().item())
    # three quarters of the channel pairs of four groups are not there
    assert grouped.density == pytest.approx(masks["1.weight"].double().mean().item() / 4)
    assert linear.density == pytest.approx(masks["3.weight"].double().mean().item())


def test_flattened_columns_belong_to_their_channel():
    conv = torch.zeros(3, 1, 1, 1, dtype=torch.bool)
    conv[0], conv[1] = True, False
    linear = torch.zeros(2, 12, dtype=torch.bool)
    linear[:, 4:8] = True  # positions of channel 1
    found = layer_graphons({"conv": conv, "linear": linear}, bins=9, order="joint")
    # channel 0 has an edge in, channel 1 edges out, channel 2 nothing: three bins
    assert found["conv"].values.tolist() == [[1.0], [0.0], [0.0]]
    assert found["linear"].values.tolist() == [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]


def test_groups_without_a_model_are_recognised_in_a_chain():
    model = small_cnn()
    masks = cnn_masks(model)
    with_model = layer_graphons(masks, model=model, order="joint")
    without = layer_graphons(masks, order="joint")
    for name in masks:
        assert torch.equal(with_model[name].values, without[name].values)


def test_transposed_convolutions_are_turned_round():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    mask = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    found = layer_graphons({"0.weight": mask}, model=model, order="none")["0.weight"].values
    taps = mask.double().mean((2, 3))
    expected = torch.block_diag(taps[:2].T, taps[2:].T)  # outputs of a group see the inputs of that group
    assert torch.equal(found, expected)


# ---- refusals and small print


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"a": torch.ones(4, 3), "b": torch.ones(2, 5)}, "'b' has 5 inputs, but 'a' before it has 4 outputs"),
        (
            {"a": torch.ones(4, 3), "b": torch.ones(2, 8)},
            "'b' has 8 inputs",
        ),  # no flattening of linear layers
        ({}, "masks is empty"),
    ],
)
def test_joint_needs_a_chain(masks, message):
    with pytest.raises(ValueError, match=message):
        layer_graphons(masks, order="joint")


def test_refuses_what_does_not_fit():
    masks, model = chain(4, 6, 2), mlp(4, 6, 2)
    with pytest.raises(ValueError, match="positions='energy' needs the weights"):
        layer_graphons(masks, order="joint", positions="energy")
    with pytest.raises(ValueError, match="Did you mean 'joint'"):
        layer_graphons(masks, order="joined")
    with pytest.raises(ValueError, match="unknown positions"):
        layer_graphons(masks, order="joint", positions="random")
    with pytest.raises(ValueError, match="bins must be at least 1"):
        layer_graphons(masks, bins=0)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(5, 4\)"):
        layer_graphons({"0.weight": torch.ones(5, 4)}, model=model)
    with pytest.raises(KeyError, match=r"no parameter '0.wieght'.*Did you mean '0.weight'"):
        layer_graphons({"0.wieght": torch.ones(6, 4)}, model=model)


def test_reparametrised_weights_are_found():
    model = nn.Sequential(nn.Linear(4, 3))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)  # weight is now an attribute, weight_orig the parameter
    mask = model[0].weight_mask.bool()
    found = layer_graphons({"0.weight": mask}, model=model, order="none")["0.weight"]
    torch.testing.assert_close(found.energy, model[0].weight.detach().double() ** 2)


def test_model_and_random_state_are_left_alone():
    masks, model = chain(6, 20, 3), mlp(6, 20, 3)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    layer_graphons(masks, model=model, order="joint", positions="spectral")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("order", ["degree", "joint"])
@pytest.mark.parametrize("fill", [0, 1])
def test_empty_and_full_masks(order, fill):
    masks = {"0.weight": torch.full((9, 4), fill).bool(), "2.weight": torch.full((2, 9), fill).bool()}
    for positions in POSITIONS:
        found = layer_graphons(masks, model=mlp(4, 9, 2), order=order, positions=positions)
        for graphon in found.values():
            assert isinstance(graphon, StepGraphon)
            assert graphon.energy.isfinite().all()
            assert graphon.density == pytest.approx(fill)


def test_quantile_labels_keep_ties_together():
    keys = torch.tensor([3.0, 1.0, 3.0, 2.0, 1.0, 1.0])
    assert quantile_labels(keys, 2).tolist() == [0, 1, 0, 0, 1, 1]
    assert quantile_labels(torch.zeros(5), 4).unique().numel() == 1
    assert quantile_labels(torch.arange(6.0), 6).tolist() == [5, 4, 3, 2, 1, 0]


def test_positions_of_a_power_law_carry_most_of_the_variance():
    # the bins of a graphon that is a function of degrees must recover it: compare with the truth per neuron
    truth = power_law(0.2, 0.4, bins=200)
    masks = {"a": truth.sample((200, 200), seed=0), "b": truth.sample((200, 200), seed=1)}
    found = layer_graphons(masks, bins=64, order="joint")["a"]
    between = (found.row_degree - found.density) ** 2 @ found.row_measure
    total = masks["a"].double().mean(1).var(correction=0)
    assert between / total > 0.9  # 8 quantiles of in-degree leave little inside them
