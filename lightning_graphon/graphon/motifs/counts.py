"""Exact counts of edges, cherries and four-cycles of a 0/1 mask."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.singular_vectors import matmul

_BLOCK = 1024  # rows at a time


def as_biadjacency(mask: Tensor) -> Tensor:
    """The mask as bool [out, in · taps].

    Raises:
        ValueError: Fewer than two axes, an empty axis, or entries that are neither 0 nor 1.
    """
    if mask.ndim < 2 or 0 in mask.shape:
        raise ValueError(f"a mask must be [out, in, *taps] with no empty axis, got shape {tuple(mask.shape)}")
    mask = mask.detach().flatten(1)
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("motifs of a mask need entries 0 or 1; for weights estimate a graphon first")
    return mask.bool()


def square_sum(mask: Tensor) -> float:
    """‖M Mᵀ‖²_F, the number of closed walks of length four, by blocks of the smaller side."""
    # Float32 products of 0/1 numbers are exact integers up to 2²⁴ columns, also in TF32.
    if mask.shape[0] > mask.shape[1]:
        mask = mask.T
    total = 0.0
    for i in range(0, mask.shape[0], _BLOCK):
        left = mask[i : i + _BLOCK].to(torch.float32)
        for j in range(i, mask.shape[0], _BLOCK):
            right = left if i == j else mask[j : j + _BLOCK].to(torch.float32)
            total += (1 if i == j else 2) * float(((left @ right.T).double() ** 2).sum())
    return total


@dataclass(frozen=True)
class Counts:
    """Counts in a 0/1 mask that determine its densities of edges, cherries and four-cycles.

    For several masks with the same number of edges the last four are float64 arrays, one entry per mask.

    Attributes:
        m: Number of rows.
        n: Number of columns.
        edges: Σ M_ij.
        row_square: Σ d_i², d the row degrees.
        col_square: Σ k_j², k the column degrees.
        products: Σ M_ij d_i k_j, walks of length three.
        walks: ‖M Mᵀ‖²_F.
    """

    m: int
    n: int
    edges: float
    row_square: Any
    col_square: Any
    products: Any
    walks: Any

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Counts":
        """Count in a bool matrix."""
        graph = ChannelGraph(mask)
        rows, cols = graph.degrees()
        products = float(rows @ matmul(graph, cols[:, None])[:, 0])
        squares = float(rows @ rows), float(cols @ cols)
        return cls(*graph.shape, float(rows.sum()), *squares, products, square_sum(mask))

    @classmethod
    def from_edges(cls, edges: np.ndarray, m: int, n: int) -> "Counts":
        """Count in a sparse matrix [m, n] from the flat indices of its edges."""
        i, j = np.divmod(edges, n)
        rows, cols = (np.bincount(x, minlength=k).astype(np.float64) for x, k in ((i, m), (j, n)))
        matrix = sparse.csr_matrix((np.ones(len(i)), (i, j)), shape=(m, n))
        gram = matrix @ matrix.T if m <= n else matrix.T @ matrix
        return cls(
            m, n, len(i), float(rows @ rows), float(cols @ cols), float(rows[i] @ cols[j]), float(gram.data @ gram.data)
        )

    @classmethod
    def from_many(cls, edges: np.ndarray, m: int, n: int) -> "Counts":
        """Count in k small matrices [m, n] at once, from the flat indices [k, edges] of their edges."""
        # Float32 where all sums are integers below 2²⁴, else float64.
        masks = torch.zeros(len(edges), m * n).scatter_(1, torch.from_numpy(edges), 1.0).view(-1, m, n)
        rows, cols = masks.sum(2), masks.sum(1)
        gram = masks @ masks.mT if m <= n else masks.mT @ masks
        row_degree_sums = (rows[:, None] @ masks)[:, 0]  # of the neighbours of each column
        sums = (rows * rows, cols * cols, row_degree_sums * cols.double(), gram.flatten(1).double().square_())
        return cls(m, n, edges.shape[1], *(total.double().sum(1).numpy() for total in sums))

    def complement(self) -> "Counts":
        """Counts of the mask's complement 1 − M, exact as long as (m n)² is below 2⁵³."""
        m, n, edges = self.m, self.n, self.edges
        absent = m * n - edges
        row_square = m * n * n - 2 * n * edges + self.row_square
        col_square = n * m * m - 2 * m * edges + self.col_square
        products = absent**2 - n * m * edges + n * self.col_square + m * self.row_square - self.products
        # Rows i and i' of the complement share n − d_i − d_i' + c columns, c the common neighbours: sum the squares.
        walks = (m * n) ** 2 - 4 * m * n * edges + 2 * edges**2 + self.walks
        walks += 2 * m * self.row_square + 2 * n * self.col_square - 4 * self.products
        return Counts(m, n, absent, row_square, col_square, products, walks)

    def cycles(self) -> float:
        """Ordered four-cycles with distinct rows and distinct columns, four per cycle."""
        # Closed walks less those with equal rows or equal columns; those with both were subtracted twice.
        cycles: float = self.walks - self.row_square - self.col_square + self.edges
        return cycles

    def signed_cycles(self) -> Any:
        """Σ X_ij X_i'j X_ij' X_i'j' over i ≠ i', j ≠ j', with X = M − p centred at the density p."""
        m, n, p = self.m, self.n, self.edges / (self.m * self.n)
        flat = n * p * p
        # All i, i': the sum of (c − p (d_i + d_i') + n p²)², c the common neighbours. Then the terms with i = i' or
        # j = j' are subtracted, and those with both, subtracted twice, are added again.
        total = self.walks - 4 * p * self.products + 2 * flat * self.col_square
        total += p * p * (2 * m * self.row_square + 2 * self.edges**2) - 4 * p * flat * m * self.edges
        total += m * m * flat * flat
        rows = _square_of_line(1 - 2 * p, n * p * p, self.row_square, self.edges, m)
        cols = _square_of_line(1 - 2 * p, m * p * p, self.col_square, self.edges, n)
        fourth = self.edges * ((1 - p) ** 4 - p**4) + m * n * p**4
        return total - rows - cols + fourth


def _square_of_line(slope: float, offset: float, square: Any, total: float, count: int) -> Any:
    """Σ (slope · d + offset)² from Σ d² and Σ d."""
    return slope**2 * square + 2 * slope * offset * total + count * offset**2
