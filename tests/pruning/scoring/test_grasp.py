"""GraSP against Hessians that are known."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_graphon.pruning import ScoringContext, prune, select_weights
from lightning_graphon.pruning.scoring.registry import get_method
from tests.helpers.networks import CASES, mlp, seeded
from tests.helpers.pruning_oracles import dense_hessian_times_gradient, scores_of


class Quadratic(nn.Module):
    """The loss ½ wᵀ A w + bᵀ w of one row of weights; the input is not used."""

    def __init__(self, size: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.row = nn.Linear(size, 1, bias=False, dtype=torch.float64)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.A = root + root.T
        self.b = torch.randn(size, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        w = self.row.weight[0]
        return 0.5 * w @ self.A @ w + self.b @ w


def quadratic_scores(**options: object) -> tuple[Tensor, Tensor]:
    """(scores, w · A (A w + b))."""
    model = seeded(Quadratic)
    with torch.no_grad():
        w = model.row.weight[0]
        expected = w * (model.A @ (model.A @ w + model.b))
    options = {"temperature": 1.0, **options}
    scores = scores_of("grasp", model, options, batches=[(torch.ones(1), None)], loss_fn=lambda out, _: out)
    return scores["row.weight"][0], expected


def test_a_quadratic_with_known_hessian_sign_included() -> None:
    scores, expected = quadratic_scores()
    torch.testing.assert_close(scores, expected)
    assert (expected > 0).any()
    assert (expected < 0).any()


def test_the_absolute_variant_ranks_by_size() -> None:
    scores, expected = quadratic_scores(absolute=True)
    torch.testing.assert_close(scores, expected.abs())


def test_temperature_divides_the_outputs() -> None:
    scores, expected = quadratic_scores(temperature=10.0)
    torch.testing.assert_close(scores, expected / 100)  # gradient and Hessian are both of loss / 10


def test_the_largest_signed_scores_stay_and_removing_the_others_raises_the_gradient_flow() -> None:
    """Removing weight i changes |g|² by −2 w_i (Hg)_i to first order: shrink one by a little and look."""
    model = seeded(Quadratic)
    scores, _ = quadratic_scores()
    batches = [(torch.ones(1), None)]
    arguments = {"batches": batches, "loss_fn": lambda out, _: out, "options": {"temperature": 1.0}}
    masks = prune(model, "grasp", sparsity=0.6, **arguments)
    assert masks["row.weight"][0].nonzero().flatten().tolist() == sorted(scores.topk(2).indices.tolist())
    absolute = prune(model, "grasp", sparsity=0.6, **{**arguments, "options": {"absolute": True, "temperature": 1.0}})
    kept = absolute["row.weight"][0].nonzero().flatten().tolist()
    assert kept == sorted(scores.abs().topk(2).indices.tolist())

    def flow(weights: Tensor) -> Tensor:
        return (model.A @ weights + model.b).square().sum()

    w, step = model.row.weight[0].detach(), 1e-6
    for i, score in enumerate(scores):
        shrunk = w.clone()
        shrunk[i] *= 1 - step
        # first order in the step: relative error of order 1e-6 times the ratio of second to first derivatives
        assert ((flow(shrunk) - flow(w)) / step).item() == pytest.approx(-2 * score.item(), rel=1e-3)


def test_in_later_rounds_the_gradient_flow_is_that_of_the_kept_weights() -> None:
    """|m ∘ g|², as only kept weights move: its derivative at the effective weights v = m ∘ w is 2 A (m ∘ g)."""
    model, rounds = seeded(Quadratic), []

    def spy(context: ScoringContext) -> dict[str, Tensor]:
        scores = get_method("grasp").score(context, temperature=1.0)
        rounds.append((context.masks["row.weight"][0].clone(), scores["row.weight"][0].clone()))
        return scores

    prune(model, spy, sparsity=0.6, steps=3, batches=[(torch.ones(1), None)], loss_fn=lambda out, _: out)
    assert not rounds[-1][0].all()
    for mask, scores in rounds:
        v = model.row.weight[0].detach() * mask
        torch.testing.assert_close(scores, v * (model.A @ (mask * (model.A @ v + model.b))))


@pytest.mark.parametrize("name", ["mlp", "residual", "grouped"])
def test_equals_a_dense_hessian_over_the_prunable_weights(name: str) -> None:
    case = CASES[name]
    model = case.model().double().eval()
    if name == "mlp":
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    inputs, targets = case.data()
    include = {"residual": ["head", "shortcut", "stem"], "grouped": ["0", "1", "3"]}.get(name)
    weights = select_weights(model, include)
    loss = nn.functional.cross_entropy(model(inputs.double()) / 200, targets)
    product = dense_hessian_times_gradient(model, loss, list(weights.values()))
    scores = scores_of("grasp", model, batches=[(inputs.double(), targets)], include=include)
    flat = torch.cat([w.detach().reshape(-1) for w in weights.values()])
    # The scores are about 1e-7 (temperature 200, squared): compare relative to the largest.
    ours, expected = torch.cat([s.reshape(-1) for s in scores.values()]), flat * product
    torch.testing.assert_close(ours / expected.abs().max(), expected / expected.abs().max())


def test_chunked_batches_equal_one_batch() -> None:
    case = CASES["mlp"]
    model = case.model()
    inputs, targets = case.data()
    whole = scores_of("grasp", model, batches=[(inputs, targets)])
    chunks = scores_of("grasp", model, batches=[(inputs[i : i + 8], targets[i : i + 8]) for i in range(0, 32, 8)])
    for name in whole:
        scale = whole[name].abs().max()
        # float32: sums of 32 in another order, twice; A11 asks for 1e-4
        torch.testing.assert_close(chunks[name] / scale, whole[name] / scale, rtol=1e-4, atol=1e-6)


def test_unused_parameters_are_allowed_and_score_zero() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = mlp(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    case, model = CASES["mlp"], seeded(Partly)
    scores = scores_of("grasp", model, batches=case.batches())
    assert not scores["unused.weight"].any()
    expected = scores_of("grasp", model.used, batches=case.batches())
    assert all(torch.equal(scores[f"used.{name}"], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["transformer", "lstm", "gru"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:not pruned")
def test_second_order_through_attention_and_recurrence(name: str, training: bool) -> None:
    case = CASES[name]
    model = case.model().train(training)
    include = "*weight*" if name != "transformer" else None
    scores = scores_of("grasp", model, batches=case.batches(), include=include)
    assert all(torch.isfinite(score).all() for score in scores.values())
    assert all(score.any() for score in scores.values())


@pytest.mark.parametrize("name", ["transformer", "lstm"])
@pytest.mark.filterwarnings("ignore:not pruned")
def test_kernels_without_a_second_derivative_are_off_even_if_the_user_asked_for_them(name: str) -> None:
    case, seen, cudnn = CASES[name], set(), torch.backends.cudnn.enabled

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        fused = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
        seen.add((fused, torch.backends.cudnn.enabled))
        return nn.functional.cross_entropy(outputs, targets)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        masks = prune(case.model(), "grasp", sparsity=0.5, batches=case.batches(), loss_fn=loss)
    assert masks.kept == masks.total // 2
    assert seen == {(False, cudnn and name != "lstm")}
    assert torch.backends.cudnn.enabled == cudnn


def test_a_loss_linear_in_the_weights_has_no_curvature_and_says_so() -> None:
    batches = [(torch.ones(2, 8), None)]
    with pytest.raises(ValueError, match=r"grasp: .*\(weight\)"):
        prune(nn.Linear(8, 4), "grasp", sparsity=0.5, batches=batches, loss_fn=lambda out, _: out.sum())
