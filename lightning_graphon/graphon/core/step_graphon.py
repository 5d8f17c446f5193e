"""The step graphon: a bipartite limit object that is constant on the cells of a grid."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon._shared.choices import Points
from lightning_graphon.graphon.core.partition import locate, overlap, refine
from lightning_graphon.graphon.core.sampling import sample_mask
from lightning_graphon.graphon.core.validation import as_cells, as_flags, as_measure, as_values

_OPTIONAL = ("energy", "drift", "std_error", "sparse_cells")


class StepGraphon:
    """Bipartite graphon W: [0, 1]² → [0, 1], constant on the cells of a grid. Immutable; tensors are copied.

    W(u, v) is the probability that output `u` is joined to input `v`. Rows are outputs (axis u), columns are
    inputs (axis v), as in a weight `[out, in]`.

    Args:
        values: Cell values [rows, cols] in [0, 1]. Lists, numpy arrays and integer or bool tensors become
            float64; floating tensors keep their dtype and device.
        row_measure: Lengths [rows] of the intervals of u, positive, summing to 1. Default: all equal.
        col_measure: Lengths [cols] of the intervals of v. Default: all equal.
        energy: Cell means [rows, cols] of w²·M for weights w under the mask M, non-negative; or None.
        drift: Cell means [rows, cols] of w·M; or None.
        std_error: Standard error [rows, cols] of each cell of an estimate; or None.
        sparse_cells: Bool [rows, cols], True where a cell expects fewer than 5 edges; or None.

    Raises:
        ValueError: A shape does not fit, a value is not finite or outside its range, or a measure is not
            positive or does not sum to 1.

    Example:
        >>> W = StepGraphon([[0.8, 0.2], [0.4, 0.0]], row_measure=[0.25, 0.75])
        >>> W
        StepGraphon(rows=2, cols=2, density=0.275)
        >>> W(0.1, 0.9).item()
        0.2
        >>> W.row_degree
        tensor([0.5000, 0.2000], dtype=torch.float64)
    """

    values: Tensor
    row_measure: Tensor
    col_measure: Tensor
    energy: Tensor | None
    drift: Tensor | None
    std_error: Tensor | None
    sparse_cells: Tensor | None

    def __init__(
        self,
        values: Any,
        row_measure: Any = None,
        col_measure: Any = None,
        *,
        energy: Any = None,
        drift: Any = None,
        std_error: Any = None,
        sparse_cells: Any = None,
    ) -> None:
        values = as_values(values)
        fields: dict[str, Tensor | None] = {
            "values": values,
            "row_measure": as_measure("row_measure", row_measure, values, 0),
            "col_measure": as_measure("col_measure", col_measure, values, 1),
            "energy": as_cells("energy", energy, values, low=0.0),
            "drift": as_cells("drift", drift, values, low=float("-inf")),
            "std_error": as_cells("std_error", std_error, values, low=0.0),
            "sparse_cells": as_flags(sparse_cells, values),
        }
        # Past the own `__setattr__`, which refuses.
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"StepGraphon is immutable, cannot set {name!r}: build a new one instead")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"StepGraphon is immutable, cannot delete {name!r}")

    # ---- shape, density, degrees

    @property
    def shape(self) -> tuple[int, int]:
        """Number of row and of column intervals."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of all tensors but the flags."""
        return self.values.dtype

    @property
    def density(self) -> float:
        """Mean ∬ W du dv, the fraction of all possible edges."""
        rows, cols = self.row_measure.double(), self.col_measure.double()
        return float(rows @ self.values.detach().double() @ cols)

    @property
    def row_degree(self) -> Tensor:
        """Degree function of the outputs [rows], ∫ W(u, v) dv (the normalised in-degree)."""
        return self.values @ self.col_measure

    @property
    def col_degree(self) -> Tensor:
        """Degree function of the inputs [cols], ∫ W(u, v) du (the normalised out-degree)."""
        return self.row_measure @ self.values

    @property
    def relative_values(self) -> Tensor:
        """Values W / ρ [rows, cols] of mean 1, as in the limits of sparse graphs; 0 if ρ = 0."""
        density = self.density
        return self.values / density if density > 0 else torch.zeros_like(self.values)

    def __call__(self, u: Tensor | float, v: Tensor | float) -> Tensor:
        """Evaluate W at points of [0, 1]; `u` and `v` broadcast against each other.

        Raises:
            ValueError: A point is outside [0, 1].
        """
        points = [torch.as_tensor(p, dtype=torch.float64, device=self.device) for p in (u, v)]
        for name, p in zip("uv", points, strict=True):
            if not bool(((p >= 0) & (p <= 1)).all()):
                raise ValueError(f"{name} must lie in [0, 1], got values from {p.min()} to {p.max()}")
        return self.values[locate(points[0], self.row_measure), locate(points[1], self.col_measure)]

    # ---- the integral operator

    def apply(self, function: Tensor) -> Tensor:
        """Integral operator (W f)(u) = ∫ W(u, v) f(v) dv for a step function on the column intervals.

        Args:
            function: Values [cols] or [cols, k] of f.

        Returns:
            Values [rows] or [rows, k].
        """
        return (self.values * self.col_measure) @ function.to(self.values)

    def apply_adjoint(self, function: Tensor) -> Tensor:
        """Adjoint operator (W* g)(v) = ∫ W(u, v) g(u) du; `function` is [rows] or [rows, k]."""
        return (self.values * self.row_measure[:, None]).T @ function.to(self.values)

    def singular_values(self) -> Tensor:
        """Singular values [min(rows, cols)] of the integral operator on L²([0, 1]), descending."""
        # An orthonormal basis of step functions has 1 / √length on each interval, hence the roots.
        scaled = self.row_measure.sqrt()[:, None] * self.values * self.col_measure.sqrt()
        return torch.linalg.svdvals(scaled)

    def compose(self, following: "StepGraphon") -> "StepGraphon":
        """Path graphon of this layer and the `following` one: ∫ W₂(x, u) W₁(u, v) du.

        Its value is the share of the neurons between that join input v to output x. The rows of this graphon
        and the columns of the following one are the same neurons; their partitions may differ.
        """
        measure, own_rows, following_cols = refine(self.row_measure, following.col_measure.to(self.device))
        second = following.to(device=self.device, dtype=self.dtype)
        product = (second.values[:, following_cols] * measure.to(self.dtype)) @ self.values[own_rows]
        return StepGraphon(product.clamp(0, 1), second.row_measure, self.col_measure)

    def __matmul__(self, previous: "StepGraphon") -> "StepGraphon":
        """`second @ first` is `first.compose(second)`, as for matrices."""
        return previous.compose(self)

    # ---- other grids

    def rebin(self, row_measure: Any, col_measure: Any) -> "StepGraphon":
        """Cell averages on another grid; exact if it refines this one, an L² projection otherwise.

        Energy and drift are averaged too; `std_error` and `sparse_cells` belong to the old cells and are dropped.
        """
        rows = torch.as_tensor(row_measure, dtype=self.dtype, device=self.device)
        cols = torch.as_tensor(col_measure, dtype=self.dtype, device=self.device)
        left = overlap(rows, self.row_measure)
        right = overlap(cols, self.col_measure)

        def project(cells: Tensor) -> Tensor:
            return (left @ cells.double() @ right.T).to(self.dtype)

        extra = {n: None if (c := getattr(self, n)) is None else project(c) for n in ("energy", "drift")}
        return StepGraphon(project(self.values), rows, cols, **extra)

    def coarsen(self, rows: int, cols: int) -> "StepGraphon":
        """Average onto `rows` by `cols` cells of equal size."""
        for name, count in (("rows", rows), ("cols", cols)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        return self.rebin([1 / rows] * rows, [1 / cols] * cols)

    def reorder(self, rows: Tensor, cols: Tensor) -> "StepGraphon":
        """Take the row and column intervals in the order of two index vectors."""
        extra = {n: None if (c := getattr(self, n)) is None else c[rows][:, cols] for n in _OPTIONAL}
        return StepGraphon(self.values[rows][:, cols], self.row_measure[rows], self.col_measure[cols], **extra)

    def sort_by_degree(self) -> "StepGraphon":
        """Reorder rows and columns so that both degree functions descend; ties keep their order."""
        rows = self.row_degree.argsort(descending=True, stable=True)
        return self.reorder(rows, self.col_degree.argsort(descending=True, stable=True))

    # ---- masks

    def sample(
        self, shape: Sequence[int], *, seed: int = 0, generator: torch.Generator | None = None, points: Points = "grid"
    ) -> Tensor:
        """Draw a mask M_ij ~ Bernoulli(W(u_i, v_j)), all entries independent.

        A seed gives the same mask whatever device the graphon is on. The global random state is not changed.

        Args:
            shape: `[out, in]`, or `[out, in, *taps]` for a convolution; every tap is its own draw.
            seed: Seed of the draw when no generator is given.
            generator: Source of randomness instead of the seed.
            points: "grid" puts output i at u = (i + ½) / out, so blocks keep their sizes; "random" draws the
                points uniformly, as in the definition of a W-random graph.

        Returns:
            Bool mask of the given shape on the graphon's device.

        Raises:
            ValueError: Fewer than two axes, an empty axis, or unknown `points`.
        """
        return sample_mask(
            self.values, self.row_measure, self.col_measure, shape, seed=seed, generator=generator, points=points
        )

    # ---- devices, states, equality

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "StepGraphon":
        """Return a copy on another device and/or with another floating dtype."""
        place, kind = device or self.device, dtype or self.dtype
        state = self.state_dict().items()
        return StepGraphon(**{k: v.to(place, v.dtype if v.dtype == torch.bool else kind) for k, v in state})

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name, those that are None left out."""
        names = ("values", "row_measure", "col_measure", *_OPTIONAL)
        return {n: t for n in names if (t := getattr(self, n)) is not None}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "StepGraphon":
        """Build a graphon from what `state_dict` returned."""
        return cls(**state)

    def __eq__(self, other: object) -> bool:
        """Whether all tensors are equal, exactly."""
        if not isinstance(other, StepGraphon):
            return NotImplemented
        own, others = self.state_dict(), other.state_dict()
        # `torch.equal` promotes dtypes, so it would call float32 and float64 values equal.
        return own.keys() == others.keys() and all(
            t.dtype == others[n].dtype and torch.equal(t, others[n].to(t.device)) for n, t in own.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        extra = [n for n in _OPTIONAL if getattr(self, n) is not None]
        tail = f", {', '.join(extra)}" if extra else ""
        return f"StepGraphon(rows={self.shape[0]}, cols={self.shape[1]}, density={self.density:.4g}{tail})"


@checked
def common_refinement(a: StepGraphon, b: StepGraphon) -> tuple[StepGraphon, StepGraphon]:
    """Both graphons on the coarsest grid that refines both.

    >>> a, b = common_refinement(StepGraphon([[0.1], [0.2]]), StepGraphon([[0.3, 0.4]]))
    >>> a.values.tolist(), b.values.tolist()
    ([[0.1, 0.1], [0.2, 0.2]], [[0.3, 0.4], [0.3, 0.4]])
    """
    b = b.to(device=a.device, dtype=torch.promote_types(a.dtype, b.dtype))
    a = a.to(dtype=b.dtype)
    rows, a_rows, b_rows = refine(a.row_measure, b.row_measure)
    cols, a_cols, b_cols = refine(a.col_measure, b.col_measure)
    return (
        StepGraphon(a.values[a_rows][:, a_cols], rows.to(a.dtype), cols.to(a.dtype)),
        StepGraphon(b.values[b_rows][:, b_cols], rows.to(a.dtype), cols.to(a.dtype)),
    )
