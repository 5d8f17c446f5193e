"""Singular values of a matrix of independent entries with a variance profile: the bulk, its edge, spikes of the mean.

For variances S on both sides together, [[0, s], [sᵀ, 0]], the resolvent's diagonal solves the quadratic vector equation
−1 / m = z + S m (Ajanki, Erdős, Krüger 2017). Outside the bulk, at a real x, b = −m is the least positive solution of
b = 1 / (x − S b); where there is none x lies inside. A mean of low rank D adds x where det(1 − diag(b) D) = 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS, _SETTLED = 2_000, 1e-9
_WIDTH = 2e-3  # of the resolution of a density, as a share of the edge
_HALVINGS = 18


@dataclass(frozen=True)
class VarianceProfile:
    """Variances s_ij = r_i c_j g_ab and means d_ab of the entries, with rows i in groups a and columns j in groups b.

    Args:
        rows: Factors r [m], float64.
        cols: Factors c [n].
        row_groups: Group of each row, int64 [m].
        col_groups: Group of each column [n].
        interaction: g [groups, groups].
        drift: Mean d [groups, groups].
    """

    rows: Tensor
    cols: Tensor
    row_groups: Tensor
    col_groups: Tensor
    interaction: Tensor
    drift: Tensor

    def apply(self, of_rows: Tensor, of_cols: Tensor) -> tuple[Tensor, Tensor]:
        """S times values [..., m] of rows and [..., n] of columns."""
        groups = self.interaction.shape
        by_row = _summed(of_rows * self.rows, self.row_groups, groups[0])
        by_col = _summed(of_cols * self.cols, self.col_groups, groups[1])
        g = self.interaction.to(by_row.dtype)
        return (
            self.rows * (by_col @ g.T)[..., self.row_groups],
            self.cols * (by_row @ g)[..., self.col_groups],
        )

    def outside(self, x: float) -> tuple[Tensor, Tensor] | None:
        """b at a real x for rows and columns; None inside the bulk."""
        b, d = torch.full_like(self.rows, 1 / x), torch.full_like(self.cols, 1 / x)
        for _ in range(_STEPS):
            left = [x - value for value in self.apply(b, d)]
            if min(float(side.min()) for side in left) <= 0:
                return None
            new = [1 / side for side in left]  # rises from step to step
            change = max(float((new[0] / b).max()), float((new[1] / d).max())) - 1
            b, d = new
            if change < _SETTLED:
                return b, d
        return None

    def edge(self) -> float:
        """The largest singular value of the bulk, certain to a ten-thousandth."""
        # No row or column sum of variances is exceeded by more than the norm: 2 √max is outside.
        sums = self.apply(torch.ones_like(self.rows), torch.ones_like(self.cols))
        low, high = 0.0, 2.0 * max(float(side.max()) for side in sums) ** 0.5
        if high == 0:
            return 0.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.outside(middle) is None else (low, middle)
        return high

    def drift_spikes(self, edge: float) -> list[float]:
        """Singular values beyond the edge that the mean adds, the largest first."""
        if edge == 0:
            return []
        near = self._gains(edge * (1 + 1e-4))
        count = int((near > 1).count_nonzero())
        return [self._spike(number, edge) for number in range(count)]

    def _spike(self, number: int, edge: float) -> float:
        low = high = edge
        while float(self._gains(high * (1 + 1e-4))[number]) > 1:
            high *= 2
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self._gains(middle * (1 + 1e-4))[number]) > 1 else (low, middle)
        return high

    def _gains(self, x: float) -> Tensor:
        """Singular values of the mean between √b on both sides; they fall with x, and are one at a spike."""
        solution = self.outside(x)
        if solution is None:  # the edge is not certain to the last digit
            return self.drift.new_full((min(self.drift.shape),), torch.inf)
        groups = self.drift.shape
        by_row = _summed(solution[0], self.row_groups, groups[0])
        by_col = _summed(solution[1], self.col_groups, groups[1])
        return torch.linalg.svdvals(by_row.sqrt()[:, None] * self.drift * by_col.sqrt())

    def density(self, points: Tensor, edge: float) -> Tensor:
        """Density of the singular values of the bulk at points [k], over the rows; rows are not more than columns."""
        z = (points + 1j * _WIDTH * edge).to(torch.complex128)[:, None]
        m, n = (-1 / z).expand(-1, len(self.rows)), (-1 / z).expand(-1, len(self.cols))
        for _ in range(_STEPS):
            sums = self.apply(m, n)
            new_m, new_n = (m - 1 / (z + sums[0])) / 2, (n - 1 / (z + sums[1])) / 2
            change = float((new_m - m).abs().mean() / m.abs().mean())
            m, n = new_m, new_n
            if change < 1e-4:
                break
        # Twice, as the law of both signs is symmetric.
        return 2 * m.imag.mean(1) / torch.pi


def _summed(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sums [..., count] over the entries of each group."""
    sums = values.new_zeros(*values.shape[:-1], count)
    return sums.index_add_(-1, groups, values)
