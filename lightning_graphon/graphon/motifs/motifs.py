"""Densities of small subgraphs in masks and step graphons, and of paths across layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import get_args

import torch
from torch import Tensor

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.choices import Counting
from lightning_graphon.graphon.core.step_graphon import StepGraphon
from lightning_graphon.graphon.inputs.relevance import input_path_density
from lightning_graphon.graphon.motifs.counts import Counts, as_biadjacency


@dataclass(frozen=True)
class MotifDensities:
    """Densities t(F) of an edge, the two cherries and the four-cycle of a bipartite graph.

    Attributes:
        edge: Density of edges, t(K2).
        row_cherry: Two edges that meet in a row (output): ∫ (∫ W dv)² du.
        col_cherry: Two edges that meet in a column (input): ∫ (∫ W du)² dv.
        c4: Two rows and two columns with all four edges: the sum of the fourth powers of W's singular values.
        counting: "distinct" or "homomorphism", whether the vertices of a motif must differ.
    """

    edge: float
    row_cherry: float
    col_cherry: float
    c4: float
    counting: str

    @property
    def c4_ratio(self) -> float:
        """The ratio t(C4) / t(K2)⁴, at least 1 for a graphon, 1 only for the constant one; 1 for an empty mask."""
        return self.c4 / self.edge**4 if self.edge > 0 else 1.0

    @property
    def row_degree_cv(self) -> float:
        """Coefficient of variation of the degree function of the rows, 0 for a constant graphon."""
        return _coefficient_of_variation(self.row_cherry, self.edge)

    @property
    def col_degree_cv(self) -> float:
        """Coefficient of variation of the degree function of the columns."""
        return _coefficient_of_variation(self.col_cherry, self.edge)


@checked
def motif_densities(graph: Tensor | StepGraphon, *, counting: Counting = "distinct") -> MotifDensities:
    """t(edge), t(cherry) of both sides and t(C4).

    `counting="distinct"` divides the number of motifs with different vertices by the number of places for them: it is
    unbiased for the graphon that the mask was drawn from, and C4 ≈ edge⁴ for a random mask of any size.
    `counting="homomorphism"` lets vertices coincide, as in the definition of t(F, W) for the mask's own step graphon
    (Lovász 2012, Section 5.2). The two differ by terms of order 1/side; for a StepGraphon they are the same.

    Args:
        graph: 0/1 mask [out, in], or [out, in, *taps] read as [out, in · taps]; or a StepGraphon.
        counting: "distinct" or "homomorphism".

    Raises:
        ValueError: Unknown `counting`; a mask with an empty axis or with entries other than 0 and 1.

    Example:
        >>> import torch
        >>> motif_densities(torch.tensor([[1, 1], [1, 0]], dtype=torch.bool)).row_cherry
        0.5
    """
    check_choice("counting", counting, get_args(Counting))
    if isinstance(graph, StepGraphon):
        return _from_graphon(graph, counting)
    return from_counts(Counts.from_mask(as_biadjacency(graph)), counting)


@checked
def path_density(layers: Sequence[StepGraphon | Tensor]) -> float:
    """Share of all possible input-output paths that a network has: the mean of the product of the layers.

    Args:
        layers: StepGraphons or 0/1 masks [out, in], input side first; a mask with taps enters with its mean over them.

    Raises:
        ValueError: No layer, graphons mixed with masks, or masks whose sides do not fit.

    Example:
        >>> path_density([StepGraphon([[0.5]]), StepGraphon([[0.2]])])
        0.1
    """
    if not layers:
        raise ValueError("path_density needs at least one layer")
    graphons = [layer for layer in layers if isinstance(layer, StepGraphon)]
    # Unlike input densities a composition takes graphons whose partitions of the neurons differ.
    if len(graphons) == len(layers):
        return reduce(StepGraphon.compose, graphons).density
    return float(input_path_density(layers).mean())


def _from_graphon(graph: StepGraphon, counting: str) -> MotifDensities:
    graph = graph.to(dtype=torch.float64)
    return MotifDensities(
        edge=graph.density,
        row_cherry=float(graph.row_degree.detach() ** 2 @ graph.row_measure),
        col_cherry=float(graph.col_degree.detach() ** 2 @ graph.col_measure),
        c4=float((graph.singular_values().detach() ** 4).sum()),
        counting=counting,
    )


def from_counts(count: Counts, counting: str = "distinct") -> MotifDensities:
    """Densities from the counts of a mask."""
    m, n = count.m, count.n
    edge = count.edges / (m * n)
    if counting == "homomorphism":
        return MotifDensities(
            edge, count.row_square / (m * n**2), count.col_square / (m**2 * n), count.walks / (m * n) ** 2, counting
        )
    return MotifDensities(
        edge=edge,
        row_cherry=_ratio(count.row_square - count.edges, m * n * (n - 1)),
        col_cherry=_ratio(count.col_square - count.edges, m * n * (m - 1)),
        c4=_ratio(count.cycles(), m * n * (m - 1) * (n - 1)),
        counting=counting,
    )


def _ratio(count: float, places: int) -> float:
    return count / places if places else 0.0


def _coefficient_of_variation(cherry: float, edge: float) -> float:
    # Negative for unbiased counts where degrees vary less than chance; then there is no variation to report.
    return max(cherry / edge**2 - 1, 0.0) ** 0.5 if edge > 0 else 0.0
