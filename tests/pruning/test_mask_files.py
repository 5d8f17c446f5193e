"""Files and states of masks that are damaged, cut off or hostile."""

import copy
import resource
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_graphon.pruning import Masks

MANY = 1 << 27  # bytes that a hostile file claims: eight times as many weights


@pytest.fixture
def masks() -> Masks:
    generator = torch.Generator().manual_seed(0)
    return Masks({name: torch.rand(5, 7, generator=generator) < 0.5 for name in ("a", "b")})


def test_a_flipped_bit_is_found(masks: Masks, tmp_path: Path) -> None:
    """Wherever it is: the file is refused, or holds the same masks."""
    path = tmp_path / "masks.pt"
    masks.save(path)
    raw = bytearray(path.read_bytes())
    for place in range(len(raw)):
        raw[place] ^= 1 << place % 8
        path.write_bytes(raw)
        with suppress(ValueError):
            assert Masks.load(path) == masks
        raw[place] ^= 1 << place % 8


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "masks.pt"
    Masks({"a": torch.rand(100_000) < 0.5}).save(path)
    raw = path.read_bytes()
    for length in (0, 1, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"masks\.pt' is no file of masks"):
            Masks.load(path)


def flip(state: dict[str, Any]) -> None:
    state["masks"]["a"]["bits"][0] ^= 1


def swap(state: dict[str, Any]) -> None:
    """As many weights kept, elsewhere."""
    bits = state["masks"]["a"]["bits"]
    state["masks"]["a"]["bits"] = bits.flip(0)
    state["masks"]["a"]["shape"] = [40]
    state["masks"]["a"]["kept"] = int(sum(bin(byte).count("1") for byte in bits.tolist()))


DAMAGE = {
    "bit": (flip, "'a' is damaged: it keeps"),
    "bits elsewhere": (swap, "differ from those of its checksum"),
    "layer lost": (lambda state: state["masks"].pop("a"), "differ from those of its checksum"),
    "layer renamed": (lambda s: s["masks"].update(c=s["masks"].pop("a")), "differ from those of its checksum"),
    "shape": (lambda state: state["masks"]["a"].update(shape=[7, 5]), "differ from those of its checksum"),
    "negative": (lambda state: state["masks"]["a"].update(shape=[-5, -7]), "damaged"),
    "no numbers": (lambda state: state["masks"]["a"].update(shape="57"), "damaged"),
    "meta": (lambda s: s["masks"]["a"].update(bits=torch.empty(5, dtype=torch.uint8, device="meta")), "plain"),
    "sparse": (lambda s: s["masks"]["a"].update(bits=s["masks"]["a"]["bits"].to_sparse()), "plain"),
    "no name": (lambda state: state["masks"].update({5: state["masks"].pop("a")}), "named by strings"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_refused_and_changes_nothing(kind: str, masks: Masks) -> None:
    state, other = masks.state_dict(), copy.deepcopy(masks)
    damage, message = DAMAGE[kind]
    damage(state)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other == masks


def test_older_states_have_neither_checksum_nor_counts(masks: Masks, tmp_path: Path) -> None:
    state, found = masks.state_dict(), Masks({})
    del state["checksum"]
    for entry in state["masks"].values():
        del entry["kept"]
    found.load_state_dict(state)
    torch.save(state, tmp_path / "masks.pt")
    assert found == Masks.load(tmp_path / "masks.pt") == masks


def test_torch_may_write_no_checksums_of_its_own(masks: Masks, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        masks.save(tmp_path / "masks.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert Masks.load(tmp_path / "masks.pt") == masks


def stride_zero(path: Path) -> None:
    save(path, {"a": torch.zeros(1, dtype=torch.uint8).expand(MANY)})


def one_storage(path: Path) -> None:
    bits = torch.zeros(1 << 16, dtype=torch.uint8)
    save(path, {str(i): bits for i in range(MANY >> 16)})


def save(path: Path, bits: dict[str, torch.Tensor]) -> None:
    torch.save({"format": 1, "masks": {n: {"shape": [8 * len(b)], "bits": b} for n, b in bits.items()}}, path)


def compressed(path: Path) -> None:
    save(path, {"a": torch.zeros(MANY, dtype=torch.uint8)})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def byte_array(path: Path) -> None:
    """The pickle of bytearray(MANY * 8), which `weights_only` allows."""
    count = str(8 * MANY).encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02cbuiltins\nbytearray\n(I" + count + b"\ntR.")
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")


@pytest.mark.parametrize("bomb", [stride_zero, one_storage, compressed, byte_array])
def test_no_more_memory_than_the_file_has(bomb: Any, tmp_path: Path) -> None:
    bomb(tmp_path / "masks.pt")
    assert (tmp_path / "masks.pt").stat().st_size < 1 << 20
    with memory_limit(256 << 20), pytest.raises(ValueError, match=r"masks\.pt.*(claims|holds builtins bytearray)"):
        Masks.load(tmp_path / "masks.pt")


class memory_limit:  # noqa: N801
    """Addresses that may be taken beyond those in use."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)
