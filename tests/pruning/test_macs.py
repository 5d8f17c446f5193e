"""Theoretical multiply-accumulates, against torch's own counter and by hand."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import l1_unstructured
from torch.utils.flop_counter import FlopCounterMode

from lightning_graphon.pruning import Masks, prune, read_masks, theoretical_macs
from tests.helpers.networks import CASES, mlp

COUNTED = ["mlp", "batchnorm", "residual", "grouped", "conv1d", "conv3d", "tied", "frozen"]


def macs_by_torch(model: nn.Module, inputs: Tensor) -> int:
    """Half of the floating-point operations that torch counts operator by operator."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", COUNTED)
def test_dense_it_is_half_of_what_torch_counts(name: str) -> None:
    model, inputs = CASES[name].model(), CASES[name].data()[0]
    found = theoretical_macs(model, inputs)
    assert found["total"].dense == found["total"].kept == macs_by_torch(model, inputs) > 0
    assert found["total"].dense == sum(macs.dense for name, macs in found.items() if name != "total")


@pytest.mark.parametrize(
    ("layer", "shape", "uses"),
    [
        (nn.Linear(4, 3), (4,), 1),
        (nn.Linear(4, 3), (5, 4), 5),
        (nn.Linear(4, 3), (5, 7, 4), 35),
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9), 2 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2, dilation=2), (2, 4, 9, 11), 2 * 3 * 4),
        (nn.Conv2d(4, 6, 3), (4, 5, 6), 3 * 4),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 6), 2 * 5 * 6),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 5), 5),
    ],
    ids=str,
)
def test_by_hand_each_weight_is_used_once_a_position(layer: nn.Module, shape: tuple[int, ...], uses: int) -> None:
    masks = prune(layer, "random", sparsity=0.7)
    found = theoretical_macs(layer, torch.ones(shape), masks)
    assert found["weight"] == found["total"] == (uses * layer.weight.numel(), uses * masks.kept)
    if len(shape) > 1 and not (isinstance(layer, nn.ConvTranspose1d) and len(shape) == 2):
        assert macs_by_torch(layer, torch.ones(shape)) == found["total"].dense


@pytest.mark.parametrize("name", COUNTED)
def test_under_masks_it_is_what_a_loop_over_the_kept_weights_adds_up(name: str) -> None:
    model, inputs = CASES[name].model(), CASES[name].data()[0]
    masks = prune(model, "random", sparsity=0.8)
    dense, found = theoretical_macs(model, inputs), theoretical_macs(model, inputs, masks)
    for layer, macs in found.items():
        assert macs.dense == dense[layer].dense
        kept = masks[layer].float().mean().item() if layer in masks else 1.0
        if layer != "total":
            assert macs.kept == pytest.approx(macs.dense * kept)
    assert found["total"].kept == sum(macs.kept for layer, macs in found.items() if layer != "total")


class Twice(nn.Module):
    """One layer called twice, the second time on fewer samples, and its weight once more in another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.same = self.a

    def forward(self, x: Tensor, *, more: bool = False) -> Tensor:
        x = self.same(self.a(x)[:2])
        return self.b(input=x) if more else x


def test_layers_called_several_times_and_tied_weights_add_up_under_one_name() -> None:
    model = Twice()
    masks = prune(model, "random", sparsity=0.5)
    assert theoretical_macs(model, torch.ones(5, 6), masks) == {"a.weight": (7 * 36, 7 * 18), "total": (7 * 36, 7 * 18)}
    found = theoretical_macs(model, {"x": torch.ones(5, 6), "more": True}, masks)
    assert found["total"] == (9 * 36, 9 * 18)
    by_other_name = theoretical_macs(model, (torch.ones(5, 6),), {"b.weight": masks["a.weight"]})
    assert by_other_name["a.weight"] == (7 * 36, 7 * 18)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("transformer", ["encoder.layers.0.self_attn.out_proj.weight", "encoder.layers.0.self_attn"]),
        ("lstm", ["rnn"]),
        ("bilinear", ["mix"]),
    ],
)
def test_what_cannot_be_counted_is_named_and_left_out(name: str, left_out: list[str]) -> None:
    model, inputs = CASES[name].model(), CASES[name].data()[0]
    with pytest.warns(UserWarning, match="not counted") as said:
        found = theoretical_macs(model, inputs)
    assert str(said[0].message).endswith(": " + ", ".join(left_out))
    assert said[0].filename == __file__
    assert not set(found) & set(left_out)
    assert "head.weight" in found
    if name == "transformer":  # the fused fast path of inference would hide them
        assert found["encoder.layers.0.linear1.weight"].dense == 16 * 5 * 8 * 16


def test_a_layer_that_is_not_called_is_named_too() -> None:
    model = mlp()
    model.spare = nn.Linear(3, 3)  # type: ignore[assignment]
    model.forward = lambda x: model[2](model[0](x))  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"not counted.*: 4\.weight, spare\.weight"):
        assert list(theoretical_macs(model, torch.ones(1, 8))) == ["0.weight", "2.weight", "total"]


def test_computed_weights_count_under_their_path() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    assert theoretical_macs(model, torch.ones(1, 4))["0.weight"] == (12, 12)
    l1_unstructured(model[1], "weight", amount=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weight of the first is computed
        masks = read_masks(model)
    assert theoretical_macs(model, torch.ones(1, 4), masks)["total"] == (18, 14)


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = CASES["batchnorm"].model().train(), CASES["batchnorm"].data()[0]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    theoretical_macs(model, inputs[:1])  # one sample: batch norm would raise in train mode
    assert model.training
    assert all(module.training for module in model)
    assert not any(module._forward_hooks for module in model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_compiled_models_are_counted_uncompiled() -> None:
    compilations = []
    compiled = torch.compile(mlp(), backend=lambda graph, inputs: compilations.append(graph) or graph.forward)
    compiled(torch.ones(1, 8))
    assert theoretical_macs(compiled, torch.ones(1, 8))["total"].dense == 8 * 16 + 16 * 16 + 16 * 4
    assert len(compilations) == 1


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"1.weight": torch.ones(2, 2).bool()}, r"no weight '1\.weight'.*Did you mean"),
        ({"0.weight": torch.ones(2, 2).bool()}, r"'0\.weight' has 128 weights, its mask 4"),
    ],
)
def test_masks_of_another_model_are_refused(masks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        theoretical_macs(mlp(), torch.ones(1, 8), Masks(masks))
