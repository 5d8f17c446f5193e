"""Loss and flow of somebody's network."""

import pytest
import torch
from torch import Tensor, nn

from lightning_graphon._shared.model_io import divide_by_temperature, flat_outputs, guess_inputs, ones_like_sample
from lightning_graphon.pruning import prune
from lightning_graphon.pruning.scoring.objective import SupervisedObjective, split_batch
from tests.helpers.networks import CASES, mlp, seeded


class Named(nn.Module):
    """Takes two inputs, by name or in order."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) - self.right(right)


def test_inputs_may_be_a_tensor_a_tuple_or_a_dict() -> None:
    model = seeded(Named)
    left, right = torch.randn(6, 4), torch.randn(6, 4)
    targets = torch.arange(6) % 3
    by_order = prune(model, "snip", sparsity=0.5, batches=[((left, right), targets)])
    by_name = prune(model, "snip", sparsity=0.5, batches=[({"right": right, "left": left}, targets)])
    assert by_order == by_name
    assert prune(model, "synflow", sparsity=0.5, batches=[({"right": right, "left": left}, targets)]).kept == 12


def test_loss_is_cross_entropy_of_the_outputs_over_the_temperature() -> None:
    net = seeded(mlp)
    inputs, targets = CASES["mlp"].data()
    loss = SupervisedObjective(net).loss((inputs, targets), temperature=200.0)
    assert torch.equal(loss, nn.functional.cross_entropy(net(inputs) / 200.0, targets))


def test_flow_is_the_sum_of_outputs_on_one_sample_of_ones() -> None:
    net = seeded(mlp)
    flow = SupervisedObjective(net).outputs_of_ones((torch.randn(5, 8), None), scale=3.0).sum()
    assert torch.equal(flow, net(torch.full((1, 8), 3.0)).sum())


def test_any_loss_function() -> None:
    net = seeded(mlp)
    inputs, _ = CASES["mlp"].data()
    masks = prune(net, "snip", sparsity=0.5, batches=[(inputs, torch.ones(32, 4))], loss_fn=nn.functional.mse_loss)
    halved = prune(net, "snip", sparsity=0.5, batches=[(inputs, torch.zeros(32, 4))], loss_fn=nn.functional.mse_loss)
    assert masks != halved


@pytest.mark.parametrize("targets", [torch.ones(4), [1, 2], None])
def test_without_a_loss_targets_must_be_classes(targets: object) -> None:
    with pytest.raises(ValueError, match=r"cross-entropy, needs .* integer class targets, got .*pass loss_fn"):
        prune(mlp(), "snip", sparsity=0.5, batches=[(torch.ones(4, 8), targets)])


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        (torch.ones(4, 8), "Tensor of length 4"),
        ((1, 2, 3), "tuple of length 3"),
        ({"x": 1}, "dict of length 1"),
        (5, "int"),
    ],
)
def test_a_batch_that_is_no_pair_is_described(batch: object, shown: str) -> None:
    with pytest.raises(TypeError, match=rf"\(inputs, targets\) pairs, got a {shown}; a single batch is \[\(inputs"):
        split_batch(batch)
    with pytest.raises(TypeError, match=shown):
        prune(mlp(), "snip", sparsity=0.5, batches=[batch])


def test_helpers_look_into_nested_outputs() -> None:
    outputs = {"logits": torch.tensor([2.0, 4.0]), "aux": [torch.tensor(6.0), torch.tensor([3])]}
    cooled = divide_by_temperature(outputs, 2.0)
    assert cooled["logits"].tolist() == [1.0, 2.0]
    assert cooled["aux"][1].tolist() == [3]
    assert flat_outputs(outputs).sum().item() == 12.0
    with pytest.raises(ValueError, match="no floating-point tensor but list"):
        flat_outputs([torch.tensor([1])])


def test_samples_of_ones_keep_tokens_and_take_the_models_precision() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    tokens = torch.tensor([[3, 1], [2, 2]])
    sample = ones_like_sample({"x": torch.zeros(3, 2), "tokens": tokens, "flag": True}, model, 0.5)
    assert sample["x"].tolist() == [[0.5, 0.5]]
    assert sample["x"].dtype == torch.bfloat16
    assert sample["tokens"].tolist() == [[3, 1]]
    assert sample["flag"] is True


def test_inputs_are_guessed_from_a_first_linear_layer() -> None:
    assert guess_inputs(mlp()).shape == (1, 8)
    with pytest.raises(ValueError, match="not known"):
        guess_inputs(nn.Sequential(nn.Conv1d(2, 2, 2)))


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda out, y: out.sum() * torch.nan, ValueError, r"the loss of scoring batch 0 is nan"),
        (lambda out, y: out.sum() + torch.inf, ValueError, r"the loss of scoring batch 0 is inf"),
        (lambda out, y: out.sum().detach(), ValueError, "the loss does not depend on the weights"),
        (lambda out, y: out.sum() * 0, ValueError, r"the loss does not depend on the weights.*0\.weight"),
        (lambda out, y: out, TypeError, r"must be a scalar tensor, got a tensor of shape \(32, 4\)"),
        (lambda out, y: 1.5, TypeError, "must be a scalar tensor, got 1.5"),
    ],
)
@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_losses_that_can_not_score_are_explained(method: str, loss_fn: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        prune(mlp(), method, sparsity=0.5, batches=[CASES["mlp"].data()], loss_fn=loss_fn)


def test_the_batch_with_the_bad_loss_is_named() -> None:
    inputs, targets = CASES["mlp"].data()
    batches = [(inputs, targets), (inputs * torch.nan, targets)]
    with pytest.raises(ValueError, match="scoring batch 1 is nan"):
        prune(mlp(), "snip", sparsity=0.5, batches=batches)
