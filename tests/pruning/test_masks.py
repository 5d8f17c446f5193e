"""`Masks`: a mapping, its table, its state, and what it does to a model."""

import copy
import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_graphon.pruning import Masks, prune
from tests.helpers.networks import CASES, mlp


@pytest.fixture
def masks() -> Masks:
    return prune(mlp(), "random", sparsity=0.7)


def test_is_a_mapping_in_network_order(masks: Masks) -> None:
    assert isinstance(masks, Mapping)
    assert list(masks) == ["0.weight", "2.weight", "4.weight"]
    assert len(masks) == 3
    assert "0.weight" in masks
    assert "0.bias" not in masks
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert masks.get("nothing") is None
    with pytest.raises(KeyError, match=r"no mask for '0\.wieght'.*Did you mean '0\.weight'"):
        masks["0.wieght"]


def test_equality_is_of_names_and_bits(masks: Masks) -> None:
    other = Masks({name: mask.clone() for name, mask in masks.items()})
    assert masks == other
    other["2.weight"][0, 0] ^= True
    assert masks != other
    assert masks != Masks({"0.weight": masks["0.weight"]})
    assert masks != 3


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=3),
    st.floats(0, 1),
    st.integers(0, 1000),
)
@settings(max_examples=60)
def test_table_and_totals_equal_a_count_by_hand(shapes: list, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = Masks({f"l{i}": torch.rand(shape, generator=generator) < density for i, shape in enumerate(shapes)})
    for row, (name, mask) in zip(masks.table(), masks.items(), strict=True):
        cells = mask.tolist()
        kept = sum(v for unit in cells for taps in unit for v in taps)
        inputs = [[v for unit in cells for v in unit[j]] for j in range(mask.shape[1])]
        assert row == {
            "layer": name,
            "shape": tuple(mask.shape),
            "total": mask.numel(),
            "kept": kept,
            "sparsity": 1 - kept / mask.numel(),
            "dead_out": sum(not any(v for taps in unit for v in taps) for unit in cells),
            "dead_in": sum(not any(column) for column in inputs),
        }
    total = sum(row["total"] for row in masks.table())
    assert masks.total == total
    assert masks.kept == sum(row["kept"] for row in masks.table())
    assert masks.sparsity == 1 - masks.kept / total


def test_state_round_trip_under_weights_only(masks: Masks) -> None:
    buffer = io.BytesIO()
    torch.save({"callback": masks.state_dict()}, buffer)
    buffer.seek(0)
    other = Masks({})
    other.load_state_dict(torch.load(buffer, weights_only=True)["callback"])
    assert other == masks
    assert list(other) == list(masks)


def test_state_is_one_bit_a_weight() -> None:
    net = mlp(width=256, inputs=256)
    masks = prune(net, "random", sparsity=0.9)
    packed = [value for entry in masks.state_dict()["masks"].values() for value in entry.values()]
    assert sum(value.nbytes for value in packed if isinstance(value, torch.Tensor)) == masks.total // 8
    buffer = io.BytesIO()
    torch.save(masks.state_dict(), buffer)
    # 1/32 of the float32 weights, and the zip file's own headers (a few hundred bytes a tensor)
    assert buffer.getbuffer().nbytes < masks.total * 4 / 32 + 4096


@pytest.mark.parametrize("state", [{}, {"format": 99, "masks": {}}, {"format": 1}, [1], None])
def test_a_foreign_state_is_refused_and_changes_nothing(state: object, masks: Masks) -> None:
    before = copy.deepcopy(masks)
    with pytest.raises(ValueError, match="not a state of Masks"):
        masks.load_state_dict(state)
    assert masks == before


def test_truncated_bits_are_refused_and_change_nothing(masks: Masks) -> None:
    state, before = masks.state_dict(), copy.deepcopy(masks)
    state["masks"]["2.weight"]["bits"] = state["masks"]["2.weight"]["bits"][:-1]
    with pytest.raises(ValueError, match="cannot hold a mask of shape"):
        masks.load_state_dict(state)
    assert masks == before


def test_files(masks: Masks, tmp_path: Path) -> None:
    masks.save(tmp_path / "masks.pt")
    assert Masks.load(tmp_path / "masks.pt") == masks
    assert Masks.load(str(tmp_path / "masks.pt")) == masks


def test_copies_are_independent(masks: Masks) -> None:
    for other in (copy.deepcopy(masks), pickle.loads(pickle.dumps(masks))):
        assert other == masks
        other["0.weight"].logical_not_()
        assert other != masks


def test_apply_zeroes_in_place_and_returns_itself(masks: Masks) -> None:
    net = mlp()
    before = {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in net.named_parameters()}
    assert masks.apply_(net) is masks
    for name, parameter in net.named_parameters():
        identity, pointer, value = before[name]
        assert (id(parameter), parameter.data_ptr()) == (identity, pointer)
        assert torch.equal(parameter, value * masks[name] if name in masks else value)
        assert parameter.is_leaf
        assert parameter.requires_grad


def test_apply_clears_what_is_not_finite() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.data.fill_(float("nan"))
    Masks({"weight": torch.zeros(1, 2, dtype=torch.bool)}).apply_(layer)
    assert layer.weight.tolist() == [[0.0, 0.0]]


def test_apply_to_another_model_says_which_layer_and_changes_nothing(masks: Masks) -> None:
    wider = mlp(width=17)
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(ValueError, match=r"another model: '0\.weight' has shape \(17, 8\).*mask has shape \(16, 8\)"):
        masks.apply_(wider)
    assert all(torch.equal(v, before[k]) for k, v in wider.state_dict().items())
    shorter = mlp(depth=2)
    with pytest.raises(ValueError, match=r"(has shape|has no parameter)"):
        masks.apply_(shorter)
    renamed = nn.Sequential()
    renamed.add_module("0x", nn.Linear(8, 16))
    with pytest.raises(ValueError, match=r"Sequential has no parameter '0\.weight'\. Did you mean '0x\.weight'"):
        masks.apply_(renamed)


def test_from_zeros_recovers_the_masks_of_a_sparse_network(masks: Masks) -> None:
    net = mlp()
    masks.apply_(net)
    assert Masks.from_zeros(net) == masks
    assert list(Masks.from_zeros(net, exclude="4")) == ["0.weight", "2.weight"]


def test_shuffling_changes_masks_and_keeps_the_counts(masks: Masks) -> None:
    shuffled = masks.shuffled(seed=1)
    assert [row["kept"] for row in shuffled.table()] == [row["kept"] for row in masks.table()]
    assert all(not torch.equal(shuffled[name], masks[name]) for name in masks)
    assert shuffled == masks.shuffled(seed=1)
    assert shuffled != masks.shuffled(seed=2)
    conv = prune(CASES["grouped"].model(), "random", sparsity=0.5)
    assert [m.shape for m in conv.shuffled().values()] == [m.shape for m in conv.values()]


def test_moving_and_showing(masks: Masks) -> None:
    assert masks.to("cpu") == masks
    assert all(mask.device.type == "meta" for mask in masks.to("meta").values())
    assert repr(masks) == "Masks(3 layers, 134 of 448 weights kept, sparsity 0.7009)"


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(2, dtype=torch.uint8), [True]])
def test_only_bool_tensors_are_masks(value: object) -> None:
    with pytest.raises(TypeError, match="mask of 'a' must be a bool tensor"):
        Masks({"a": value})
