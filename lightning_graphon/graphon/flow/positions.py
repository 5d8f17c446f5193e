"""Places of a mask's units that stay while the mask changes: else nothing could be compared."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon._shared.choices import LayerOrder
from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.estimate import memberships


@dataclass(frozen=True)
class UnitPositions:
    """Bin of every unit of a mask.

    Attributes:
        rows: Bin [out] of each output, int64.
        cols: Bin [in] of each input, int64.

    >>> mask = torch.tensor([[False, True, False], [True, True, True]])
    >>> positions = UnitPositions.of(mask, bins=2)
    >>> positions.rows.tolist(), positions.cols.tolist()
    ([1, 0], [0, 0, 1])
    >>> positions.counts(mask).tolist()
    [[2, 1], [1, 0]]
    """

    rows: Tensor
    cols: Tensor

    @classmethod
    def of(cls, mask: Tensor, bins: int, order: LayerOrder = "degree") -> "UnitPositions":
        """Sort the units of a mask and cut them into bins; of equal units the earlier comes first.

        Args:
            mask: Bool [out, in, *taps].
            bins: Of each axis.
            order: "degree", "spectral" or "none"; "joint" is taken as "degree".
        """
        own: LayerOrder = "degree" if order == "joint" else order
        rows, cols = memberships(ChannelGraph(mask), bins, own, "index")
        return cls(rows.argmax(1), cols.argmax(1))

    @property
    def shape(self) -> tuple[int, int]:
        """Number of bins of rows and of columns."""
        return int(self.rows.max()) + 1, int(self.cols.max()) + 1

    def counts(self, mask: Tensor) -> Tensor:
        """Kept weights in each cell [row bins, column bins], int64."""
        places = mask.to(self.rows.device).nonzero()  # few of all weights
        rows, cols = self.shape
        cells = self.rows[places[:, 0]] * cols + self.cols[places[:, 1]]
        return torch.bincount(cells, minlength=rows * cols).reshape(rows, cols)

    def sizes(self, taps: int = 1) -> Tensor:
        """Weights in each cell [row bins, column bins], kept or not, int64."""
        return torch.outer(torch.bincount(self.rows), torch.bincount(self.cols)) * taps
