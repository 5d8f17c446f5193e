"""One bit a weight, there and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_graphon._shared.bits import pack, unpack
from lightning_graphon.pruning.packing import pack_all, unpack_all


@given(st.lists(st.booleans(), max_size=70))
def test_round_trip_of_any_length(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack(packed, mask.shape), mask)


def test_bits_equal_numpys() -> None:
    numpy = pytest.importorskip("numpy")
    mask = torch.rand(7, 5, 3) < 0.3
    assert pack(mask).tolist() == numpy.packbits(mask.numpy()).tolist()


def test_a_mask_that_is_not_contiguous_keeps_its_logical_order() -> None:
    mask = torch.rand(6, 4) < 0.5
    assert torch.equal(unpack(pack(mask.T), (4, 6)), mask.T)
    channels_last = (torch.rand(3, 4, 2, 2) < 0.5).to(memory_format=torch.channels_last)
    assert torch.equal(unpack(pack(channels_last), (3, 4, 2, 2)), channels_last)


def test_all_masks_keep_names_shapes_and_order() -> None:
    masks = {"b": torch.rand(3, 3) < 0.5, "a": torch.rand(2, 2, 5) < 0.5}
    back = unpack_all(pack_all(masks))
    assert list(back) == ["b", "a"]
    assert all(torch.equal(back[name], masks[name]) for name in masks)


@pytest.mark.parametrize("bits", [torch.zeros(1, dtype=torch.uint8), torch.zeros(2)])
def test_bytes_that_do_not_fit_the_shape_are_refused(bits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"cannot hold a mask of shape \(3, 3\)"):
        unpack(bits, (3, 3))
