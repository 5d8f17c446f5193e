"""The graph between channels behind a mask of any shape, read in chunks of rows.

A mask [out, in] is its own graph. A convolution's mask [out, in / groups, *taps] is a graph between channels
whose edge weight is the mean over the taps; channels of different groups are not joined. The whole mask is never
copied to a wider dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 20  # entries converted to float64 at a time, 8 MiB


class ChannelGraph:
    """Rows of the channel graph of M, or of wᵖ·M where weights w are given, as float64 chunks.

    Args:
        mask: [out, in / groups, *taps], bool or numbers in [0, 1].
        weight: Weights of the same shape, or None.
        power: Exponent of the weights: 1 for drift, 2 for energy.
        groups: Number of groups of the convolution.

    Raises:
        ValueError: The mask has fewer than two axes or an empty one, or the groups do not divide its first.
    """

    def __init__(self, mask: Tensor, weight: Tensor | None = None, *, power: int = 1, groups: int = 1) -> None:
        if mask.ndim < 2 or 0 in mask.shape:
            raise ValueError(f"a mask must be [out, in, *taps] with no empty axis, got shape {tuple(mask.shape)}")
        if groups < 1 or mask.shape[0] % groups:
            raise ValueError(f"groups must divide the first axis {mask.shape[0]} of the mask, got {groups}")
        mask = mask.detach()
        weight = None if weight is None else weight.detach()
        self.mask, self.weight, self.power, self.groups = mask, weight, power, groups
        self.shape = (mask.shape[0], mask.shape[1] * groups)
        # MPS has no float64.
        self.device = torch.device("cpu") if mask.device.type == "mps" else mask.device
        self._degrees: tuple[Tensor, Tensor] | None = None

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Pairs of a range of rows and those rows [rows, in], float64."""
        step = max(1, _CHUNK // max(self.shape[1], self.mask[0].numel()))
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            yield rows, self._fill_groups(rows, self._edge_weights(rows))

    def _edge_weights(self, rows: slice) -> Tensor:
        part = self.mask[rows].to(self.device, torch.float64)
        if self.weight is not None:
            weight = self.weight[rows].to(self.device, torch.float64)
            part = part * (weight if self.power == 1 else weight**self.power)
        return part.flatten(2).mean(2) if part.ndim > 2 else part

    def _fill_groups(self, rows: slice, part: Tensor) -> Tensor:
        """Rows [k, in / groups] to [k, in], with zeros between channels of different groups."""
        if self.groups == 1:
            return part
        out_per_group, in_per_group = self.shape[0] // self.groups, part.shape[1]
        group = torch.arange(rows.start, rows.stop, device=part.device) // out_per_group
        full = part.new_zeros(len(part), self.groups, in_per_group)
        full[torch.arange(len(part), device=part.device), group] = part
        return full.flatten(1)

    def degrees(self) -> tuple[Tensor, Tensor]:
        """Row sums [out] and column sums [in], float64, computed once.

        Raises:
            ValueError: An entry of a floating mask is outside [0, 1] or not a number.
        """
        if self._degrees is None:
            self._degrees = self.sums()
        return self._degrees

    def sums(self, power: int = 1) -> tuple[Tensor, Tensor]:
        """Sums of the entries to a power, of rows [out] and of columns [in], float64."""
        rows = torch.empty(self.shape[0], dtype=torch.float64, device=self.device)
        cols = torch.zeros(self.shape[1], dtype=torch.float64, device=self.device)
        check = self.weight is None and self.mask.dtype != torch.bool
        for span, part in self.chunks():
            if check and not bool(((part >= 0) & (part <= 1)).all()):
                raise ValueError(f"a mask must be bool or lie in [0, 1], got values from {part.min()} to {part.max()}")
            part = part**power
            rows[span] = part.sum(1)
            cols += part.sum(0)
        return rows, cols
