"""Masks as one bit per weight, in tensors that `torch.load(weights_only=True)` accepts, and what proves them whole."""

import hashlib
import io
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_graphon._shared.bits import pack, unpack

# All that a file of masks names. Others may make more of a few bytes: bytearray(2**40) is a pickle of 30.
_GLOBALS = {"torch._utils _rebuild_tensor_v2", "torch ByteStorage", "collections OrderedDict"}


def pack_all(masks: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Pack named masks: name -> {"shape": list of int, "kept": int, "bits": uint8 tensor}."""
    return {
        name: {"shape": list(mask.shape), "kept": int(mask.count_nonzero()), "bits": pack(mask)}
        for name, mask in masks.items()
    }


def unpack_all(packed: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Inverse of `pack_all`.

    Raises:
        ValueError: Bits are claimed that are not there, or a mask keeps another number of weights than it says.
    """
    _check_bits_are_there([entry["bits"] for entry in packed.values()])
    masks = {name: unpack(entry["bits"], entry["shape"]) for name, entry in packed.items()}
    for name, mask in masks.items():
        kept, said = int(mask.count_nonzero()), packed[name].get("kept")  # older files do not say
        if said not in (None, kept):
            raise ValueError(f"the mask of {name!r} is damaged: it keeps {kept} weights and should keep {said}")
    return masks


def _check_bits_are_there(bits: Sequence[Tensor]) -> None:
    """A tensor of stride 0, several of one storage, or one without any, would unpack to more than what was read."""
    if any(b.layout != torch.strided or b.device.type == "meta" for b in bits):
        raise ValueError("packed bits must be plain tensors")
    storages = {s.data_ptr(): s.nbytes() for s in (b.untyped_storage() for b in bits)}
    claimed, there = sum(b.nbytes for b in bits), sum(storages.values())
    if claimed > there:
        raise ValueError(f"it claims {claimed} bytes of masks and holds {there}")


def checksum(packed: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 of the names, shapes and bits of `pack_all`, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(packed):
        digest.update(repr((name, list(packed[name]["shape"]))).encode())
        digest.update(packed[name]["bits"].cpu().contiguous().numpy())
    return digest.hexdigest()


def load_packed(content: bytes) -> Any:
    """What `torch.save` wrote of packed masks, in no more memory than the file has bytes.

    Raises:
        Exception: `content` is damaged or something else.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(content):  # torch does not compress
            raise ValueError("it claims more bytes than it has")
        (listing,) = (entry for entry in entries if entry.filename.endswith("/data.pkl"))
        listing.CRC = None  # type: ignore[assignment]  # torch may be told to write none
        names = {str(arg) for code, arg, _ in pickletools.genops(archive.read(listing)) if code.name == "GLOBAL"}
    if not names <= _GLOBALS:
        raise ValueError(f"it holds {', '.join(sorted(names - _GLOBALS))}")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
