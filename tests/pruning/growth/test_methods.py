"""What leaves and what grows, on small layers by hand and on random ones."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_graphon._shared.weight_layout import WeightLayout
from lightning_graphon.graphon import as_graphon
from lightning_graphon.pruning import GrowthConfig, GrowthContext, Masks, MaskUpdater, growth_methods, prune
from lightning_graphon.pruning.growth import beginning_masks, get_growth, register_growth
from lightning_graphon.pruning.growth.constant_fan_in import keep_in_rows
from lightning_graphon.pruning.growth.exchange import grow_largest, keep_largest_weights


def context(shape=(12, 20), density=0.3, seed=0, **kwargs):
    source = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=source) < density
    weight, gradient = (torch.randn(shape, generator=source) for _ in range(2))
    given = {"weights": {"a": weight * mask}, "masks": {"a": mask}, "gradients": {"a": gradient}}
    return GrowthContext(**{**given, "counts": {"a": int(mask.sum())}, **kwargs})


def test_ties_go_to_the_earlier_weight():
    weight, mask = torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([True, True, False, True])
    assert keep_largest_weights(weight, mask, 2).tolist() == [True, True, False, False]
    assert keep_largest_weights(weight, mask, 0).tolist() == [False] * 4
    scores = torch.tensor([5.0, 2.0, 2.0, 2.0])
    kept = torch.tensor([True, False, False, False])
    assert grow_largest(kept, scores, 2).tolist() == [True, True, True, False]


@pytest.mark.parametrize("seed", range(5))
def test_rows_keep_their_largest_scores_and_of_ties_the_earlier(seed):
    source = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (9, 11), generator=source).float()
    counts = torch.randint(0, 12, (9,), generator=source)
    found = keep_in_rows(scores, counts)
    for row, count, flags in zip(scores.tolist(), counts.tolist(), found.tolist(), strict=True):
        best = sorted(range(11), key=lambda i: (-row[i], i))[:count]
        assert [i for i, flag in enumerate(flags) if flag] == sorted(best)


def test_rigl_grows_where_gradients_are_large_and_may_keep_what_it_drops():
    weight, mask = torch.tensor([[0.1, 3.0, 0.0, 0.0]]), torch.tensor([[True, True, False, False]])
    for gradient, expected in (([9.0, 0.0, 1.0, -2.0], [0, 1]), ([0.0, 9.0, 1.0, -2.0], [1, 3])):
        given = {"weights": {"a": weight}, "masks": {"a": mask}, "gradients": {"a": torch.tensor([gradient])}}
        found = get_growth("rigl").update(GrowthContext(**given, counts={"a": 2}, fraction=0.5))
        assert found["a"].flatten().nonzero().flatten().tolist() == expected


def test_random_growth_is_that_of_its_seed_and_update():
    first = context()
    masks = [get_growth("set").update(c)["a"] for c in (first, first, replace(first, seed=1), replace(first, update=2))]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])


@pytest.mark.parametrize("method", ["set", "rigl", "snfs", "srigl", "graphon"])
@pytest.mark.parametrize("shape", [(12, 20), (8, 6, 3, 3)])
def test_counts_are_exact(method, shape):
    options = {"graphons": {"family": "power-law", "exponent": 0.5}} if method == "graphon" else {}
    if method == "srigl":
        options = {"min_salient": 0.0}
    c = context(shape, density=0.25)
    new = get_growth(method).update(c, **options)["a"]
    units = shape[0]
    expected = c.counts["a"] // units * units if method == "srigl" else c.counts["a"]
    assert int(new.sum()) == expected
    assert (new != c.masks["a"]).any()


def test_weights_that_are_not_finite_leave_first_and_counts_stay():
    c = context()
    weight = c.weights["a"].clone()
    weight[c.masks["a"]] = torch.nan
    new = get_growth("rigl").update(replace(c, weights={"a": weight}))["a"]
    assert int(new.sum()) == c.counts["a"]


def test_growth_keeps_the_topology_of_its_graphon():
    target = as_graphon([[0.6, 0.1], [0.1, 0.0]])
    net = nn.Linear(60, 50)
    masks = prune(net, "graphon", sparsity=0.8, options={"graphons": target})
    config = GrowthConfig("graphon", every_n_steps=1, fraction=0.5, options={"graphons": target})
    updater = MaskUpdater(net, masks, config, config.schedule(200))
    mask, source = masks["weight"].clone(), torch.Generator().manual_seed(0)
    first = mask.clone()
    for _ in range(100):
        assert updater.step()
        weight = torch.randn(mask.shape, generator=source) * mask
        mask = updater.update({"weight": weight}, {}, {"weight": mask})["weight"]
    cells = mask.reshape(2, 25, 2, 30).float().mean((1, 3))
    expected = torch.tensor([[0.6, 0.1], [0.1, 0.0]]).double()
    assert int(mask.sum()) == masks.kept
    assert (first != mask).float().mean() > 0.15
    # Odds of all cells times one factor give a fifth; a cell of 750 weights is off by its own rounding and a few.
    assert torch.allclose(cells.double(), expected, atol=0.02)


def test_a_graphon_draws_masks_of_another_topology_to_itself():
    target = as_graphon([[0.4, 0.0], [0.0, 0.4]])
    net = nn.Linear(40, 40)
    masks = prune(net, "random", sparsity=0.8)
    config = GrowthConfig("graphon", every_n_steps=1, fraction=0.3, options={"graphons": target})
    updater = MaskUpdater(net, masks, config, config.schedule(100))
    mask, source = masks["weight"], torch.Generator().manual_seed(0)
    for _ in range(70):
        updater.step()
        mask = updater.update({"weight": torch.randn(40, 40, generator=source)}, {}, {"weight": mask})["weight"]
    outside = mask[:20, 20:].sum() + mask[20:, :20].sum()
    assert outside < 0.05 * mask.sum()


def test_a_layer_with_more_room_and_larger_gradients_gets_more():
    one, other = context(seed=1), context(seed=2)
    both = GrowthContext(
        weights={"a": one.weights["a"], "b": other.weights["a"]},
        masks={"a": one.masks["a"], "b": other.masks["a"]},
        gradients={"a": 10 * one.gradients["a"], "b": other.gradients["a"]},
        counts={"a": one.counts["a"], "b": other.counts["a"]},
        floors={"b": other.counts["a"] - 5},
        fraction=0.5,
        moves=True,
    )
    new = get_growth("rigl").update(both)
    counts = {name: int(mask.sum()) for name, mask in new.items()}
    assert sum(counts.values()) == sum(both.counts.values())
    assert counts["a"] > both.counts["a"]
    assert counts["b"] >= both.floors["b"]
    still = replace(both, gradients={name: torch.zeros_like(g) for name, g in both.gradients.items()})
    assert sum(int(m.sum()) for m in get_growth("rigl").update(still).values()) == sum(both.counts.values())


def test_units_are_ablated_and_come_back():
    torch.manual_seed(0)
    weight = torch.randn(4, 10)
    weight[0] *= 0.01
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, :3] = True
    gradient = torch.rand(4, 10) * 0.1
    gradient[0] = 0
    gradient[1:] += 1
    given = {"counts": {"a": 12, "b": 12}, "fraction": 0.25}
    layers = {"weights": weight * mask, "masks": mask, "gradients": gradient}
    both = {key: {"a": value, "b": value} for key, value in layers.items()}
    new = get_growth("srigl").update(GrowthContext(**both, **given))
    assert new["a"].sum(1).tolist() == [0, 4, 4, 4]
    assert new["b"].sum(1).tolist() == [3, 3, 3, 3], "units of the last layer stay"
    gradient[0] = 9
    again = get_growth("srigl").update(
        GrowthContext(
            weights={"a": weight * new["a"], "b": weight},
            masks={"a": new["a"], "b": mask},
            gradients={"a": gradient, "b": gradient},
            **given,
        )
    )
    assert again["a"].sum(1).tolist() == [3, 3, 3, 3]


def test_as_many_units_stay_as_can_hold_all_weights():
    weight = torch.tensor([[2.0, 1.0, 0.0, 0.0]] * 4)
    gradient = torch.tensor([[9.0, 1.0, 2.0, 3.0]] * 4)
    # One weight of each unit stays, and that is where gradients are large: no unit has the two that it needs.
    given = {"weights": {"a": weight}, "masks": {"a": weight > 0}, "gradients": {"a": gradient}}
    new = get_growth("srigl").update(
        GrowthContext(**given, counts={"a": 8}, fraction=0.5), min_salient=1.0, ablate_last=True
    )
    assert new["a"].sum(1).tolist() == [4, 4, 0, 0], "eight weights need two units of four inputs"


def test_momentum_is_a_geometric_sum_of_the_last_gradients_and_begins_anew():
    net = nn.Linear(3, 1, bias=False)
    masks = Masks({"weight": torch.tensor([[True, False, False]])})
    config = GrowthConfig("snfs", every_n_steps=3, options={"momentum": 0.5})
    updater, seen = MaskUpdater(net, masks, config, config.schedule(100)), []
    for step in range(1, 7):
        assert updater.needs_gradients
        updater.add_to_momentum({"weight": torch.full((1, 3), float(step))})
        seen.append(updater.state_dict()["momentum"]["weight"][0, 0].item())
        if updater.step():
            updater.update({"weight": net.weight.detach()}, {}, masks)
    assert seen == [1.0, 2.5, 4.25, 4.0, 7.0, 9.5]


def test_constant_fan_in_begins_random_and_follows_the_axes_of_a_transposed_weight():
    from lightning_graphon.pruning import PruningConfig

    net = nn.Sequential(nn.Linear(20, 10), nn.ConvTranspose2d(6, 8, 3))
    config = PruningConfig("random", 0.7, allocation="erk")
    masks = beginning_masks(net, config, constant_fan_in=True)
    assert len(set(masks["0.weight"].sum(1).tolist())) == 1
    assert len(set(masks["1.weight"].transpose(0, 1).flatten(1).sum(1).tolist())) == 1
    layout = {"1.weight": WeightLayout(transposed=True)}
    mask = masks["1.weight"]
    c = GrowthContext(
        weights={"1.weight": net[1].weight.detach()},
        masks={"1.weight": mask},
        gradients={"1.weight": torch.randn(mask.shape)},
        counts={"1.weight": int(mask.sum())},
        layouts=layout,
    )
    new = get_growth("srigl").update(c)["1.weight"]
    assert new.shape == mask.shape
    assert len(set(new.transpose(0, 1).flatten(1).sum(1).tolist())) == 1


def test_gradual_pruning_ends_at_its_budget_with_one_threshold_over_all_layers():
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    with torch.no_grad():
        net[1].weight.mul_(10)
    from lightning_graphon.pruning import PruningConfig

    pruning = PruningConfig("random", 0.9, allocation="global", min_density=0.02)
    masks = beginning_masks(net, pruning, constant_fan_in=False)
    config = GrowthConfig("gmp", every_n_steps=1, stop=5)
    updater = MaskUpdater(net, masks, config, config.schedule(10), pruning)
    weights, seen = {n: net.get_parameter(n).detach() for n in masks}, []
    now = dict(masks)
    while updater.step():
        new = updater.update(weights, {}, now)
        assert all(not (new[n] & ~now[n]).any() for n in now)
        now = new
        seen.append(sum(int(mask.sum()) for mask in now.values()))
    assert seen == [90 + int(round((1 - step / 4) ** 3, 12) * 810 + 1e-9) for step in (1, 2, 3, 4)]
    assert int(now["0.weight"].sum()) == 12, "the floor of the layer with small weights"


def test_a_method_of_ones_own():
    @register_growth("nothing-grows-here")
    def keep(context):
        return dict(context.masks)

    assert "nothing-grows-here" in growth_methods()
    c = context()
    assert torch.equal(get_growth("nothing-grows-here").update(c)["a"], c.masks["a"])
    with pytest.raises(ValueError, match="exists already"):

        @register_growth("rigl")
        def other(context):
            return {}


def test_a_state_goes_on_bit_for_bit():
    net = nn.Linear(20, 10)
    masks = prune(net, "random", sparsity=0.8)
    config = GrowthConfig("snfs", every_n_steps=5)

    def updater():
        return MaskUpdater(net, masks, config, config.schedule(100), seed=3)

    def run(u, steps, mask, saved_at=None):
        state = None
        for step in steps:
            gradient = {"weight": torch.randn(10, 20, generator=torch.Generator().manual_seed(step))}
            if u.needs_gradients:
                u.add_to_momentum(gradient)
            if u.step():
                mask = u.update({"weight": net.weight.detach()}, gradient, {"weight": mask})["weight"]
            if step == saved_at:
                state = u.state_dict(), mask.clone()
        return mask, state

    whole, (state, mask) = run(updater(), range(1, 31), masks["weight"], saved_at=13)
    assert state["momentum"]["weight"].shape == (10, 20)
    rest = updater()
    rest.load_state_dict(state)
    found, _ = run(rest, range(14, 31), mask)
    assert torch.equal(found, whole)
    assert Masks({"weight": whole}).kept == masks.kept
