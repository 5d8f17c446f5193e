"""`Masks`: which weights of a network are kept, stored outside the network."""

import hashlib
import io
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lightning_graphon._shared.bits import pack
from lightning_graphon._shared.checks import as_kind, nearest
from lightning_graphon._shared.files import write_file
from lightning_graphon._shared.random import generator
from lightning_graphon._shared.weight_layout import WeightLayout, layout_of
from lightning_graphon.pruning.candidates import LayerPatterns
from lightning_graphon.pruning.layer_selection import find_weights
from lightning_graphon.pruning.packing import checksum, load_packed, pack_all, unpack_all
from lightning_graphon.pruning.sharding import full_tensor, local_shard, local_shard_like

_FORMAT = 1
GivenMasks: TypeAlias = Mapping[str, Tensor] | str | PathLike[str]


class Masks(Mapping[str, Tensor]):
    """Masks of a network: a mapping from a parameter's qualified name to a bool tensor, True = kept.

    Args:
        masks: Name -> bool tensor of the weight's shape, on any device.

    Raises:
        TypeError: A value is not a bool tensor.

    >>> masks = Masks({"0.weight": torch.tensor([[True, False], [False, False]])})
    >>> masks.sparsity
    0.75
    >>> masks.table()[0]["kept"]
    1
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        given = as_kind("masks", masks, Mapping)
        masks = {name: torch.tensor(m) if isinstance(m, np.ndarray) else m for name, m in given.items()}
        for name, mask in masks.items():
            if not isinstance(name, str):
                raise TypeError(f"masks are named by strings, got {name!r}")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(f"mask of {name!r} must be a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
        self._masks = masks

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._masks[name]
        except KeyError:
            raise KeyError(f"no mask for {name!r}. {nearest(name, self._masks)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        total, kept = self.total, self.kept
        return f"Masks({len(self)} layers, {kept} of {total} weights kept, sparsity {self.sparsity:.4f})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping) or self.keys() != other.keys():
            return False
        return all(torch.equal(mask.cpu(), other[name].cpu()) for name, mask in self.items())

    __hash__ = None  # type: ignore[assignment]

    @property
    def total(self) -> int:
        """Number of weights that have a mask."""
        return sum(mask.numel() for mask in self.values())

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(int(mask.count_nonzero()) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the masked weights that is removed, in [0, 1]."""
        return 1 - self.kept / self.total if self.total else 0.0

    def table(self, model: nn.Module | None = None) -> list[dict[str, Any]]:
        """One row per layer: layer, shape, total, kept, sparsity, dead_out, dead_in.

        `dead_out` counts output units without a kept weight, `dead_in` inputs without one. Which axis is which says the
        model; without one outputs are the first axis.
        """
        layouts = {} if model is None else {name: layout_of(model, name) for name in self}
        return [_row(name, mask, layouts.get(name, WeightLayout())) for name, mask in self.items()]

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> "Masks":
        """Set the pruned weights of `model` to zero, in place; parameters keep their identity.

        Raises:
            ValueError: `model` has no parameter of that name and shape.
        """
        for parameter, mask in self.pairs(model):
            local_shard(parameter).masked_fill_(~local_shard_like(mask, parameter), 0)
        return self

    def pairs(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters of `model` with their masks.

        Raises:
            ValueError: `model` has no parameter of that name and shape; the message names it.
        """
        # Tied parameters may be named by any of their names.
        parameters = dict(model.named_parameters(remove_duplicate=False))
        pairs = []
        for name, mask in self.items():
            if name not in parameters:
                raise ValueError(
                    f"the masks were made for another model: {type(model).__name__} has no parameter {name!r}. "
                    f"{nearest(name, parameters)}"
                )
            if parameters[name].shape != mask.shape:
                raise ValueError(
                    f"the masks were made for another model: {name!r} has shape {tuple(parameters[name].shape)} "
                    f"in {type(model).__name__} but its mask has shape {tuple(mask.shape)}"
                )
            pairs.append((parameters[name], mask))
        return pairs

    def fitting(self, model: nn.Module) -> "Masks":
        """Those of them that `model` has a parameter of that name and shape for."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        return Masks({name: mask for name, mask in self.items() if shapes.get(name) == mask.shape})

    def to(self, device: torch.device | str) -> "Masks":
        """These masks on another device."""
        return Masks({name: mask.to(device) for name, mask in self.items()})

    def shuffled(self, seed: int = 0) -> "Masks":
        """Each layer's mask in a random order: the same counts without structure, a sanity check."""
        # Drawn on the CPU, so that a seed gives the same masks on every device.
        source = generator(seed, "shuffled masks")
        return Masks(
            {
                name: mask.reshape(-1)[torch.randperm(mask.numel(), generator=source).to(mask.device)].view(mask.shape)
                for name, mask in self.items()
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """The masks packed to one bit per weight with a checksum, as plain tensors, lists, numbers and a string."""
        packed = pack_all(self)
        return {"format": _FORMAT, "masks": packed, "checksum": checksum(packed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace these masks by those of `state_dict()`.

        Raises:
            ValueError: `state` does not come from `state_dict`, or is damaged: its checksum is another one.
        """
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT or "masks" not in state:
            raise ValueError(f"not a state of Masks (format {_FORMAT}): got {type(state).__name__} without it")
        try:
            masks = Masks(unpack_all(state["masks"]))
            whole = state.get("checksum") in (None, checksum(state["masks"]))  # older states have none
        except ValueError:
            raise
        except Exception as error:  # whatever else foreign values raise
            raise ValueError(f"not a state of Masks: it is damaged ({error!r})") from error
        if not whole:
            raise ValueError("the state of Masks is damaged: names, shapes or bits differ from those of its checksum")
        self._masks = masks._masks

    def digests(self) -> dict[str, int]:
        """Name -> a number of 56 bits that tells masks apart, the same on every machine."""
        packed = {name: hashlib.sha256(pack(mask).numpy().tobytes()).digest() for name, mask in self.items()}
        return {name: int.from_bytes(digest[:7], "big") for name, digest in packed.items()}

    def save(self, path: str | PathLike[str]) -> None:
        """Write the packed masks to a file that `Masks.load` reads; an older one stays until it is whole."""
        buffer = io.BytesIO()
        torch.save(self.state_dict(), buffer)
        write_file(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Masks":
        """Read masks written by `save`, with `weights_only=True`, in no more memory than their file and their weights.

        Raises:
            OSError: There is no such file, or it cannot be read.
            ValueError: It does not hold masks, or is damaged; the message names it.
        """
        content, masks = Path(path).read_bytes(), cls({})
        try:
            masks.load_state_dict(load_packed(content))
        except Exception as error:  # torch raises many kinds of errors for files of other programs
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{str(path)!r} is no file of masks, such as masks.save(path) writes: {reason}") from error
        return masks

    @classmethod
    def from_zeros(cls, model: nn.Module, include: LayerPatterns = None, exclude: LayerPatterns = None) -> "Masks":
        """Masks of a network that is already sparse: a weight is kept where it is not zero.

        `include` and `exclude` as in `prune`. If weights are sharded, every process must call it.
        """
        return cls({name: full_tensor(w.detach() != 0) for name, w in find_weights(model, include, exclude).items()})


def as_masks(masks: GivenMasks) -> Masks:
    """Masks from a mapping, or from a file that `Masks.save` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: Neither a mapping nor a path, or a value is no bool tensor.
        ValueError: The file holds something else, or there is no mask.
    """
    if isinstance(masks, (str, PathLike)):
        found = Masks.load(masks)
    elif isinstance(masks, Mapping):
        found = masks if isinstance(masks, Masks) else Masks(masks)
    else:
        raise TypeError(f"masks must be Masks, a dict of bool tensors or the path of a file, got {masks!r:.80}")
    if not found:
        raise ValueError("masks has no mask in it: give one bool tensor for each weight to prune, by parameter name")
    return found


def _row(name: str, mask: Tensor, layout: WeightLayout) -> dict[str, Any]:
    kept, total = int(mask.count_nonzero()), mask.numel()
    rows = layout.rows(mask)
    # Scalars and vectors count as one input, or one unit.
    units = rows.reshape(rows.shape[0], -1) if rows.ndim else rows.reshape(1, 1)
    inputs = rows.transpose(0, 1).reshape(rows.shape[1], -1) if rows.ndim > 1 else units.T
    return {
        "layer": name,
        "shape": tuple(mask.shape),
        "total": total,
        "kept": kept,
        "sparsity": 1 - kept / total if total else 0.0,
        "dead_out": int((~units.any(dim=1)).count_nonzero()),
        "dead_in": int((~inputs.any(dim=1)).count_nonzero()),
    }
