"""PX, SynFlow-L2, FORCE, ProsPr and NTK-SAP against references written anew from their pseudocode."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import preserve_random_state
from lightning_graphon._shared.random import generator, seed_for
from lightning_graphon.pruning import prune
from lightning_graphon.pruning.scoring import registry
from tests.helpers import published_pruners as reference
from tests.helpers.networks import CASES, classes, mlp, seeded
from tests.helpers.pruning_oracles import scores_of


def agree(masks: dict, expected: dict) -> None:
    """In 99.9 % of the weights: of equal scores either may stay, all other things are the same."""
    different = sum(int((masks[name] != expected[name]).count_nonzero()) for name in expected)
    total = sum(mask.numel() for mask in expected.values())
    assert different <= total / 1000
    assert all(0 < int(mask.count_nonzero()) < mask.numel() for mask in expected.values())


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("method", ["px", "synflow-l2", "force"])
def test_masks_of_rounds(method: str, kind: str) -> None:
    model, batches = reference.example(kind)
    score = partial(getattr(reference, method.replace("-", "_")), kind, model, batches)
    expected = reference.rounds(model, score, 0.8, steps=6, revives=method == "force")
    agree(prune(model, method, sparsity=0.8, batches=batches, steps=6), expected)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_prospr(kind: str, momentum: float) -> None:
    model, batches = reference.example(kind)
    score = partial(reference.prospr, kind, model, batches, steps=3, lr=0.1, beta=momentum)
    masks = prune(model, "prospr", sparsity=0.8, batches=batches, options={"momentum": momentum})
    agree(masks, reference.rounds(model, score, 0.8, steps=1, revives=False))


def test_prospr_without_steps_is_snip() -> None:
    case, model = CASES["mlp"], CASES["mlp"].model()
    first = case.batches()[:1]
    masks = prune(model, "prospr", sparsity=0.5, batches=first, options={"training_steps": 0})
    assert masks == prune(model, "snip", sparsity=0.5, batches=first)
    assert masks != prune(model, "prospr", sparsity=0.5, batches=first)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_ntk_sap(kind: str) -> None:
    model, batches = reference.example(kind)

    def score(masks: dict[str, Tensor]) -> dict[str, Tensor]:
        kept, draws = sum(int(m.sum()) for m in masks.values()), []
        for number, (x, _) in enumerate(batches):
            purpose = f"ntk-sap at {kept}, draw {number}"
            drawn = seeded(reference.NETS[kind][0]).double()
            with preserve_random_state(seed_for(0, purpose)):
                for module in reversed(list(drawn.modules())):
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()
            source = generator(0, f"noise of {purpose}")
            noise = {n: torch.randn(m.shape, generator=source).double() for n, m in masks.items()}
            inputs = torch.randn(x.shape, generator=generator(0, f"inputs of {purpose}")).double()
            draws.append((reference.values(drawn), noise, inputs))
        return reference.ntk_sap(kind, draws, masks, epsilon=0.01)

    expected = reference.rounds(model, score, 0.8, steps=6, revives=False)
    agree(prune(model, "ntk-sap", sparsity=0.8, batches=batches, steps=6), expected)


def test_ntk_sap_sees_neither_weights_nor_data() -> None:
    masks = []
    for seed in (0, 1):
        model = seeded(mlp, seed)
        batches = [(torch.full((16, 8), float(seed)), torch.zeros(16, dtype=torch.long))]
        masks.append(prune(model, "ntk-sap", sparsity=0.8, batches=batches, steps=3))
    assert masks[0] == masks[1]
    assert masks[0] != prune(seeded(mlp), "ntk-sap", sparsity=0.8, batches=batches, steps=3, seed=1)
    assert prune(seeded(mlp), "ntk-sap", sparsity=0.8, steps=3).kept == 90  # without a batch, too


def test_ntk_sap_is_the_trace_of_the_tangent_kernel() -> None:
    """Of one linear layer f = (m ⊙ θ) x the distance is ε² Σ_n |m ⊙ N x_n|²: its derivative does not depend on θ."""
    layer = nn.Linear(6, 3, bias=False).double()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double()
    scores = scores_of("ntk-sap", layer, {"draws": 400}, batches=[(x, torch.zeros(5, dtype=torch.long))])["weight"]
    # E = 2 ε² · 5 samples · E x² per draw; the mean of 400 draws of a product of chi-squares is certain to 10 %.
    assert scores.mean().item() / 400 == pytest.approx(2 * 1e-4 * 5, rel=0.1)


# ---- PX and SynFlow-L2: of rank one, and what PX sees of the data


@pytest.mark.parametrize("method", ["px", "synflow-l2"])
def test_the_score_over_the_squared_weight_has_rank_one_in_every_layer_of_an_mlp(method: str) -> None:
    """In the first round exactly a_i b_j, in later ones where a weight is kept."""
    model, batches = reference.example("mlp")
    scores = scores_of(method, model, batches=batches)
    for name, score in scores.items():
        ratio = score / model.get_parameter(name).detach().square()
        singular = torch.linalg.svdvals(ratio)
        assert float(singular[1] / singular[0]) < 5e-15  # rounding of sums of 40; measured: 5e-16
    # In the second round of `prune` the first one's pruned weights score zero; the others are of rank one still.
    model, batches = reference.example("mlp")
    masks = prune(model, method, sparsity=0.5, batches=batches, steps=1)
    masks.apply_(model)
    for name, score in scores_of(method, model, batches=batches).items():
        kept = masks[name]
        ratio = (score / model.get_parameter(name).detach().square()).where(kept, torch.nan)
        i, j = kept.nonzero()[0].tolist()
        both = kept & kept[i][None] & kept[:, j][:, None]
        product = ratio[:, j][:, None] * ratio[i][None] / ratio[i, j]
        torch.testing.assert_close(ratio[both], product[both], rtol=1e-12, atol=0)


def test_in_its_first_round_px_sees_no_data_where_the_last_layer_is_dense() -> None:
    """Its outputs then share z₁, so the batch enters as a factor; in later rounds they see different paths."""
    for kind in ("mlp", "cnn"):
        model, batches = reference.example(kind)
        other = [(x.roll(1, 1) * torch.linspace(0, 3, x.shape[1]).view(-1, *[1] * (x.ndim - 2)), y) for x, y in batches]
        once = [prune(model, "px", sparsity=0.8, batches=b, steps=1) for b in (batches, other)]
        assert once[0] == once[1]
        scores = [scores_of("px", model, batches=b) for b in (batches, other)]
        ratios = torch.cat([(scores[0][n] / scores[1][n]).flatten() for n in scores[0]])
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-10, atol=0)
        often = [prune(model, "px", sparsity=0.95, batches=b, steps=20) for b in (batches, other)]
        assert often[0] != often[1]


@pytest.mark.parametrize("padding", [0, 1])
def test_with_outputs_in_places_px_sees_data_at_once_at_the_borders_only(padding: int) -> None:
    """Outputs at other places have other z₁, by gates and inputs; z₂ is the same at all places but near a padding."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(2, 8, 3, padding=padding), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=padding)
    )
    model, masks = seeded(layers).double(), []
    for slope in (torch.linspace(0, 3, 8), torch.linspace(3, 0, 8)):
        x = classes((8, 2, 8, 8))[0].double() * slope
        masks.append(prune(model, "px", sparsity=0.8, batches=[(x, None)], steps=1))
    assert (masks[0] != masks[1]) == (padding > 0)


def test_px_needs_inputs_and_no_targets() -> None:
    with pytest.raises(ValueError, match=r"px scores weights by the inputs: give at least one batch"):
        prune(mlp(), "px", sparsity=0.5)
    x = classes((8, 8))[0]
    assert prune(seeded(mlp), "px", sparsity=0.5, batches=[(x, None)], steps=2).kept == 224


# ---- FORCE: weights return


def test_weights_return_under_force_and_never_under_snip() -> None:
    model, batches = reference.example("mlp")
    for method, returned in (("force", True), ("snip", False)):
        before, came_back = None, 0
        for masks in masks_of_rounds(method, model, batches):
            if before is not None:
                came_back += sum(int((masks[n] & ~before[n]).count_nonzero()) for n in masks)
            before = masks
        assert (came_back > 0) == returned


def masks_of_rounds(method: str, model: nn.Module, batches: list) -> list[dict[str, Tensor]]:
    known = registry._METHODS[method]
    seen = []

    def spy(context):
        seen.append(dict(context.masks))
        return known.score(context)

    registry._METHODS[method] = replace(known, score=spy)
    try:
        prune(model, method, sparsity=0.9, batches=batches, steps=8)
    finally:
        registry._METHODS[method] = known
    return seen


def test_one_round_of_force_is_snip() -> None:
    case, model = CASES["batchnorm"], CASES["batchnorm"].model()
    masks = [prune(model, method, sparsity=0.8, batches=case.batches(), steps=1) for method in ("force", "snip")]
    assert masks[0] == masks[1]
