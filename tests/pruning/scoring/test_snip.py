"""SNIP against finite differences of the mask."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_graphon.pruning import prune
from tests.helpers.networks import CASES, mlp, seeded
from tests.helpers.pruning_oracles import scores_of


def mask_differences(model: nn.Module, name: str, loss: callable, step: float = 1e-5) -> Tensor:
    """|∂ loss / ∂ m| of each entry of a mask of ones, by central differences in float64."""
    weight = model.get_parameter(name).detach()
    out = torch.zeros_like(weight)
    for i in range(weight.numel()):
        mask = torch.ones_like(weight)
        values = []
        for sign in (1, -1):
            mask.view(-1)[i] = 1 + sign * step
            values.append(loss({name: weight * mask}))
        out.view(-1)[i] = abs(values[0] - values[1]) / (2 * step)
    return out


@pytest.mark.parametrize("name", ["mlp", "residual", "grouped", "tied", "lstm"])
def test_scores_are_the_sensitivity_to_the_mask_averaged_over_batches(name: str) -> None:
    case = CASES[name]
    model = case.model().double().eval()
    if name == "mlp":  # tanh: finite differences do not meet ReLU's kink
        model = nn.Sequential(*[nn.Tanh() if isinstance(m, nn.ReLU) else m for m in model])
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in case.batches()]
    if name != "tied":
        batches[1] = (batches[1][0][:5], batches[1][1][:5])  # uneven: each batch counts once, not each sample

    @torch.no_grad()
    def loss(changed: dict[str, Tensor]) -> float:
        return sum(case.loss(functional_call(model, changed, (x,)), y).item() for x, y in batches) / len(batches)

    scores = scores_of("snip", model, batches=batches, include="rnn.*" if name == "lstm" else None)
    for layer, score in scores.items():
        expected = mask_differences(model, layer, loss)
        # central differences with step 1e-5: truncation 1e-10, rounding 1e-16 / 1e-5
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-8)
        assert score.max() > 0


def test_the_absolute_value_is_taken_after_the_mean() -> None:
    """Opposite gradients on two batches cancel."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0]])
    batches = [(torch.tensor([[1.0, 1.0]]), 0.0), (torch.tensor([[-1.0, 1.0]]), 0.0)]
    scores = scores_of("snip", layer, batches=batches, loss_fn=lambda out, target: out.sum())
    assert scores["weight"].tolist() == [[0.0, 2.0]]


def test_splitting_into_equal_batches_changes_nothing() -> None:
    case, model = CASES["mlp"], CASES["mlp"].model()
    whole = scores_of("snip", model, batches=[case.data()])
    halves = scores_of("snip", model, batches=case.batches())
    for name in whole:
        torch.testing.assert_close(whole[name], halves[name])


class Sum(nn.Module):
    """A layer whose weight is the sum of two: autograd gives both the same gradient tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.a.weight + self.b.weight).T


@pytest.mark.parametrize("method", ["snip", "synflow"])
def test_weights_that_share_a_gradient(method: str) -> None:
    model, case = seeded(Sum), CASES["mlp"]
    scores = scores_of(method, model, batches=case.batches())
    ratio = scores["a.weight"] / scores["b.weight"]
    torch.testing.assert_close(ratio.float(), (model.a.weight / model.b.weight).detach().abs())


def test_the_mode_of_the_model_is_kept() -> None:
    case, masks = CASES["batchnorm"], []
    for training in (True, False):
        model = case.model().train(training)
        masks.append(prune(model, "snip", sparsity=0.8, batches=case.batches()))
    assert masks[0] != masks[1]


def test_dropout_is_drawn_from_the_seed_of_the_call() -> None:
    case, model = CASES["batchnorm"], CASES["batchnorm"].model()
    first = scores_of("snip", model, batches=case.batches())
    torch.manual_seed(123)
    again = scores_of("snip", model, batches=case.batches())
    other = scores_of("snip", model, batches=case.batches(), seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_iterative_snip_scores_the_network_without_its_pruned_weights() -> None:
    """Two rounds by hand: prune to half, set those weights to zero, score again, prune the rest."""
    case, net = CASES["mlp"], seeded(lambda: mlp(width=30))
    batches = case.batches()
    masks = prune(net, "snip", sparsity=0.75, batches=batches, steps=2)
    first = prune(net, "snip", sparsity=0.5, batches=batches)
    first.apply_(net)
    second = prune(net, "snip", sparsity=0.75, batches=batches)
    assert masks == second
    assert all(not (second[name] & ~first[name]).any() for name in first)
