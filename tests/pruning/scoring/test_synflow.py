"""SynFlow: finite at any depth, and the ranking of an exact oracle in the log domain."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.pruning import LayerCollapseWarning, prune
from lightning_graphon.pruning.config import PruningConfig
from lightning_graphon.pruning.prune import compute_masks
from lightning_graphon.pruning.scoring.objective import SupervisedObjective
from tests.helpers.networks import CASES, Residual, mlp, seeded
from tests.helpers.pruning_oracles import scores_of, synflow_log_scores


def linears(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [0.5, 1.0, 100.0])
@pytest.mark.parametrize("depth", [2, 5, 30, 100, 200])
def test_scores_are_finite_and_equal_the_log_domain_up_to_one_factor(depth: int, gain: float, bias: bool) -> None:
    """Gain 100 at depth 200 is a flow of about 10^500: the scores may be scaled, all by the same number."""
    net = seeded(lambda: mlp(width=12, depth=depth, bias=bias))
    with torch.no_grad():
        for layer in linears(net):
            layer.weight.mul_(gain)
    scores = list(scores_of("synflow", net).values())
    assert all(torch.isfinite(score).all() for score in scores)
    assert all((score > 0).all() for score in scores)
    ratios = [
        score.double().log().numpy() - expected
        for score, expected in zip(scores, synflow_log_scores(linears(net)), strict=True)
    ]
    factor = ratios[0].mean()
    # float64 over 200 layers, and logarithms of up to 1000 whose last digit is 1e-13
    assert max(np.abs(ratio - factor).max() for ratio in ratios) < 1e-9
    if depth <= 30:
        assert factor == pytest.approx(0.0, abs=1e-9)  # no scaling where none is needed


def test_finite_where_the_reference_overflows() -> None:
    """He initialisation, width 512: float32 is infinite at depth 30."""
    net = seeded(lambda: mlp(width=512, depth=30, bias=False, inputs=512, outputs=512))
    for layer in linears(net):
        nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"leaves the range of torch.float32.*float64"):
        prune(net, "synflow", sparsity=0.5, steps=1, options={"double": False})
    scores = scores_of("synflow", net)
    assert all(torch.isfinite(score).all() for score in scores.values())
    assert max(float(score.max()) for score in scores.values()) > torch.finfo(torch.float32).max


@pytest.mark.parametrize("depth", [5, 30, 100, 200])
def test_pruning_deep_networks_keeps_every_layer_alive(depth: int) -> None:
    """Without biases the sum of scores is the same in every layer, so none collapses (Tanaka et al., theorem 3)."""
    net = seeded(lambda: mlp(width=12, depth=depth, bias=False, inputs=12, outputs=12))
    masks = prune(net, "synflow", sparsity=0.9, steps=20)
    assert masks.kept == round(0.1 * masks.total)
    assert all(row["kept"] > 0 for row in masks.table())


@pytest.mark.parametrize("name", ["mlp", "residual", "batchnorm"])
def test_without_biases_the_flow_is_conserved(name: str) -> None:
    model = CASES[name].model()
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.running_var.uniform_(0.5, 2)
    scores = scores_of("synflow", model, {"biases": False}, batches=CASES[name].batches())
    sums = {n: s.sum().item() for n, s in scores.items()}
    if name == "residual":  # two branches share what passes through the stem
        assert sums["block.weight"] + sums["shortcut.weight"] == pytest.approx(sums["stem.weight"], rel=1e-12)
        assert sums["head.weight"] == pytest.approx(sums["stem.weight"], rel=1e-12)
    else:
        assert list(sums.values()) == pytest.approx([next(iter(sums.values()))] * len(sums), rel=1e-12)


def test_biases_take_part_in_the_flow_by_default() -> None:
    net = seeded(mlp)
    with_biases, without = scores_of("synflow", net), scores_of("synflow", net, {"biases": False})
    assert all((with_biases[name] > without[name]).all() for name in list(without)[1:])


def test_batchnorm_and_signs_enter_by_absolute_value() -> None:
    """An oracle network that holds |θ| and |buffers| itself, in eval mode, on one sample of ones."""
    case = CASES["batchnorm"]
    model = case.model().train()
    for norm in (model[1], model[5]):
        norm.weight.data.uniform_(-1, 1)
        norm.bias.data.uniform_(-1, 1)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    oracle = case.model().double().eval()
    oracle.load_state_dict({key: value.abs() for key, value in model.state_dict().items()})
    oracle(torch.ones(1, 2, 5, 5, dtype=torch.float64)).sum().backward()
    scores = scores_of("synflow", model, batches=case.batches())
    for name, score in scores.items():
        parameter = oracle.get_parameter(name)
        torch.testing.assert_close(score.double(), (parameter * parameter.grad).detach())


def test_data_do_not_matter_only_their_shape() -> None:
    case = CASES["residual"]
    model = case.model()
    first = prune(model, "synflow", sparsity=0.8, batches=case.batches(), steps=5)
    other = prune(model, "synflow", sparsity=0.8, batches=[(torch.full((1, 2, 5, 5), -7.0), None)], steps=5)
    assert first == other


def test_the_shape_is_guessed_from_a_first_linear_layer_or_the_example() -> None:
    net = seeded(mlp)
    assert prune(net, "synflow", sparsity=0.8) == prune(net, "synflow", sparsity=0.8, batches=CASES["mlp"].batches())
    residual = seeded(Residual)
    with pytest.raises(ValueError, match=r"shape of the inputs of Residual is not known.*batches="):
        prune(residual, "synflow", sparsity=0.8)
    residual.example_input_array = torch.zeros(2, 2, 5, 5)
    assert prune(residual, "synflow", sparsity=0.8, steps=3).kept > 0


def test_hundred_rounds_by_default() -> None:
    net = seeded(lambda: mlp(width=40))
    assert prune(net, "synflow", sparsity=0.9) == prune(net, "synflow", sparsity=0.9, steps=100)
    assert prune(net, "synflow", sparsity=0.8) != prune(net, "synflow", sparsity=0.8, steps=1)


def test_rounds_by_hand() -> None:
    """Exponential schedule in three rounds, each on the network that is left."""
    net = seeded(lambda: mlp(width=20))
    masks = prune(net, "synflow", sparsity=0.9, steps=3)
    total = masks.total
    for step in (1, 2, 3):
        removed = int((1 - 0.1 ** (step / 3)) * total) if step < 3 else total - masks.kept
        by_hand = prune(net, "synflow", sparsity=removed / total, steps=1)
        by_hand.apply_(net)
    assert masks == by_hand


def test_token_models() -> None:
    case = CASES["tied"]
    masks = prune(case.model(), "synflow", sparsity=0.5, batches=case.batches(), steps=5)
    assert masks.kept == masks.total // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_precision_of_the_model(dtype: torch.dtype) -> None:
    net = seeded(mlp).to(dtype)
    masks = prune(net, "synflow", sparsity=0.8)
    assert masks.kept == round(0.2 * masks.total)
    assert all(p.dtype == dtype for p in net.parameters())


def test_models_that_insist_on_their_precision_are_scored_in_it() -> None:
    class Shifted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(super().forward(x), torch.eye(4))  # no buffer: stays float32

    net = Shifted(*seeded(mlp))
    with pytest.warns(UserWarning, match="synflow scores in the model's own precision"):
        masks = prune(net, "synflow", sparsity=0.8, steps=5)
    assert masks == prune(net, "synflow", sparsity=0.8, steps=5, options={"double": False})


class Detached(nn.Module):
    """Uses a weight detached in front of where it is trained: its gradient is complete before that use's pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(nn.functional.linear(self.first(x), self.layer.weight.detach()))


def test_a_weight_that_is_used_detached_keeps_its_value_until_then() -> None:
    model = seeded(Detached)
    oracle = seeded(Detached).double()
    oracle.load_state_dict({key: value.abs() for key, value in model.state_dict().items()})
    oracle(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    for name, score in scores_of("synflow", model).items():
        parameter = oracle.get_parameter(name)
        torch.testing.assert_close(score, (parameter * parameter.grad).detach())


def test_scores_that_somebody_keeps_are_not_overwritten_by_the_next_round() -> None:
    net, plan = seeded(lambda: mlp(width=40)), PruningConfig("synflow", 0.9, steps=4)
    kept, copies = [], []

    def look(_: int, scores: Mapping[str, Tensor]) -> None:
        kept.append(dict(scores))
        copies.append({name: score.clone() for name, score in scores.items()})

    compute_masks(net, plan, SupervisedObjective(net), [], on_scores=look)
    assert len(kept) == 4
    assert all(
        torch.equal(scores[name], copy[name]) for scores, copy in zip(kept, copies, strict=True) for name in copy
    )


def test_outputs_that_ignore_the_weights_are_an_error() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    with pytest.raises(ValueError, match="synflow: the outputs do not depend on the weights"):
        prune(Constant(), "synflow", sparsity=0.5)


def test_an_empty_batch_has_a_shape_too() -> None:
    model = seeded(mlp)
    batches = [(torch.randn(n, 8), torch.zeros(n, dtype=torch.long)) for n in (0, 4)]
    empty, full = (prune(model, "synflow", sparsity=0.5, batches=[batch]) for batch in batches)
    assert empty == full


@pytest.mark.parametrize("last", [nn.Softmax(-1), nn.LayerNorm(4)], ids=["softmax", "layer norm"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_outputs_of_constant_sum_are_an_error(seed: int, double: bool, last: nn.Module) -> None:
    """Their scores are zeros on some processors and rounding noise on others."""
    model = nn.Sequential(*seeded(lambda: mlp(width=24 + seed), seed), last)
    with pytest.raises(ValueError, match=r"synflow: every score is zero to rounding.*constant sum"):
        prune(model, "synflow", sparsity=0.5, options={"double": double})


@pytest.mark.parametrize("double", [True, False])
def test_little_flow_is_a_flow(double: bool) -> None:
    """A hundred thousandth of the outputs is the weights', the rest a bias: the ranking is that without the bias."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    expected = prune(model, "synflow", sparsity=0.5, steps=1)
    nn.init.constant_(model[-1].bias, 1e5)
    assert prune(model, "synflow", sparsity=0.5, steps=1, options={"double": double}) == expected


def test_a_network_that_nothing_flows_through_is_an_error() -> None:
    model = seeded(mlp)
    nn.init.zeros_(model[-1].weight)
    with pytest.raises(ValueError, match=r"synflow: every score is zero.*a head initialised so"):
        prune(model, "synflow", sparsity=0.5)


def test_a_network_that_falls_apart_between_rounds_is_a_collapse_and_no_error() -> None:
    """Ones saturate the Tanh: the layers before it score zero, and of those the later one goes in the first round."""
    a, b, c = seeded(lambda: [nn.Linear(n, m, bias=False) for n, m in pairwise((3072, 64, 32, 10))])
    with pytest.warns(LayerCollapseWarning, match=r"2 of 3 layers.*2\.weight, 4\.weight.*zero from round 2 of 100 on"):
        masks = prune(nn.Sequential(a, nn.ReLU(), b, nn.Tanh(), c), "synflow", sparsity=0.9)
    assert masks.kept == round(0.1 * masks.total)


def test_a_negative_flow_is_a_flow_like_any_other() -> None:
    """Log-probabilities: no other scale of the inputs may be tried, since the ranking would be that of another flow."""
    model = nn.Sequential(*seeded(mlp), nn.LogSoftmax(-1)).double()
    scores = scores_of("synflow", model, batches=[(torch.randn(2, 8), torch.zeros(2, dtype=torch.long))])
    parameters = {name: p.detach().abs().requires_grad_() for name, p in model.named_parameters()}
    flow = torch.func.functional_call(model, parameters, torch.ones(1, 8, dtype=torch.float64)).sum()
    flow.backward()
    assert flow < 0
    for name, score in scores.items():
        torch.testing.assert_close(score, (parameters[name] * parameters[name].grad).abs())
