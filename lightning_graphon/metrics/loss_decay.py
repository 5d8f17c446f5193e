"""Predicted against observed loss as a torchmetrics metric."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon.metrics.functional import (
    MOMENTS,
    fits_from_moments,
    log_moments,
    loss_decay_errors,
    merge_moments,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_KEYS = (
    "relative_error", "relative_error_last", "log_correlation", "rate_predicted", "rate_observed", "rate_ratio",
    "valid_until", "invalid_from", "points",
)  # fmt: skip


class LossDecay(Metric):
    r"""How well a predicted loss curve agrees with the observed one.

    As input `update` accepts

    - `predicted` (Tensor or float): losses, a number or [K];
    - `observed` (Tensor or float): losses of the same points;
    - `step` (Tensor or number): optimizer steps of the same points, in any order; or any other axis, rates are then
      per unit of it (with the sum of learning rates they do not depend on the schedule).

    As output `compute` returns a dictionary of float64 scalars

    - `relative_error`: mean of |p − o|/|o| over the points where it is finite;
    - `relative_error_last`: the same at the last step; the mean over the points that share it;
    - `log_correlation`: Pearson correlation of the logarithms; NaN where a curve is constant;
    - `rate_predicted`, `rate_observed`: r of the least-squares fits log L = a − r·step, over the same points;
    - `rate_ratio`: predicted over observed rate;
    - `valid_until`: step of the last point before the first one outside the tolerance, NaN if there is none; of the
      points that are kept for `plot`;
    - `invalid_from`: step of the first point outside the tolerance, inf if there is none;
    - `points`: number of points.

    Points with a loss that is not positive and finite take no part in logarithms and fits. A relative error is
    0 where both losses are equal (both 0, too), inf where only the observed one is 0, and not within the
    tolerance where it is inf or NaN.

    States merge over updates, processes and `merge_state`, as if one metric had seen all points; a point seen on
    several processes counts several times, which changes no mean, fit or correlation. `invalid_from` is the smallest
    over processes. Where processes hold parts of the probe, average the losses first, then update. States are part of
    `state_dict`. The curve for `plot` keeps at most `max_points`, evenly thinned over the steps.

    Args:
        tolerance: Largest relative error of a valid prediction.
        max_points: Largest number of points of the curve for `plot`, at least 2.
        prefix: Prefix of every key, e.g. "loss_decay/".
        key: Key of the one number that `compute` returns; needed by `self.log("error", metric)`, which takes no dict.
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: A negative tolerance, fewer than two points, or an unknown key.

    >>> metric = LossDecay(tolerance=0.1)
    >>> for k in range(4):
    ...     metric.update(0.5**k, 0.52**k, k)
    >>> values = metric.compute()
    >>> round(values["rate_ratio"].item(), 3), values["valid_until"].item(), values["invalid_from"].item()
    (1.06, 2.0, 3.0)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    points: Tensor
    finite: Tensor
    errors: Tensor
    bound: Tensor
    invalid: Tensor
    moments: Tensor
    latest: Tensor
    curve: Tensor

    @checked
    def __init__(
        self, tolerance: float = 0.1, max_points: int = 1024, prefix: str = "", key: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if key is not None:
            check_choice("key", key, _KEYS)
        if not tolerance >= 0:
            raise ValueError(f"tolerance is a relative error and must be 0 or more, got {tolerance!r}")
        if max_points < 2:
            raise ValueError(f"max_points must be at least 2, got {max_points!r}")
        self.tolerance, self.max_points, self.prefix, self.key = tolerance, max_points, prefix, key
        zero = torch.zeros((), dtype=torch.float64)
        # Metrics that differ in their tolerance must not share states in a MetricCollection, which compares states,
        # and torchmetrics 1.6.0 only the first of them.
        self.add_state("bound", zero + tolerance, dist_reduce_fx="max")
        for name in ("points", "finite", "errors"):
            self.add_state(name, zero.clone(), dist_reduce_fx="sum", persistent=True)
        self.add_state("invalid", zero + torch.inf, dist_reduce_fx="min", persistent=True)
        self.add_state("moments", zero.repeat(MOMENTS), dist_reduce_fx=merge_moments, persistent=True)
        # Last step, sum of its errors, number of its points.
        self.add_state("latest", torch.tensor([-torch.inf, 0.0, 0.0]).double(), merge_latest, persistent=True)
        self.add_state("curve", zero.new_full((max_points, 3), torch.nan), merge_curves, persistent=True)

    def update(self, predicted: Tensor | float, observed: Tensor | float, step: Tensor | float) -> None:
        """Add points.

        Raises:
            ValueError: Lengths differ, or steps are not finite.
        """
        points = self._as_points(predicted, observed, step)
        if points.shape[1] == 0:
            return
        p, o, t = points
        # In the common dtype float64, in which sums over many steps keep their digits.
        error = loss_decay_errors(p, o)
        finite = error.isfinite()
        # Not in place: a state made in inference mode could not be changed outside it.
        self.points = self.points + len(t)
        self.finite = self.finite + finite.sum()
        self.errors = self.errors + error[finite].sum()
        outside = torch.where(error <= self.tolerance, torch.inf, t)  # NaN is outside
        self.invalid = torch.minimum(self.invalid, outside.min())
        self.moments = merge_moments(torch.stack([self.moments, log_moments(p, o, t)]))
        last = t == t.max()
        now = torch.stack([t.max(), error[last].sum(), last.sum().to(t)])
        self.latest = merge_latest(torch.stack([self.latest, now]))
        self.curve = _thinned(torch.cat([self.curve, points[[2, 0, 1]].T]), self.max_points)

    def _as_points(self, predicted: Tensor | float, observed: Tensor | float, step: Tensor | float) -> Tensor:
        """Points [3, K] on the metric's device."""
        given = [
            torch.as_tensor(v, dtype=torch.float64, device=self.points.device).detach().reshape(-1)
            for v in (predicted, observed, step)
        ]
        if len({len(v) for v in given}) != 1:
            raise ValueError(
                f"give one predicted loss, observed loss and step per point, got {[len(v) for v in given]}"
            )
        points = torch.stack(given)
        if not bool(points[2].isfinite().all()):
            raise ValueError("steps must be finite")
        return points

    def compute(self) -> Any:
        """Values by key, or that of `key`; NaN before the first update, as torchmetrics warns."""
        nan = torch.full_like(self.points, torch.nan)
        seen = self.points > 0
        held = self.curve[self.curve[:, 0] < self.invalid, 0]  # NaN rows are not smaller
        predicted, observed, correlation = fits_from_moments(self.moments)
        values = {
            "relative_error": self.errors / self.finite,
            "relative_error_last": self.latest[1] / self.latest[2],
            "log_correlation": correlation,
            "rate_predicted": predicted,
            "rate_observed": observed,
            "rate_ratio": predicted / observed,
            "valid_until": held.max() if len(held) else nan,
            "invalid_from": torch.where(seen, self.invalid, nan),
            "points": torch.where(seen, self.points, nan),
        }
        if self.key is not None:
            return values[self.key]
        return {self.prefix + key: value for key, value in values.items()}

    def plot(self, ax: Any = None) -> "Figure":
        """Draw both curves and the step from which the prediction no longer holds, as this process saw them.

        Args:
            ax: Matplotlib axes to draw on; by default those of a new figure outside pyplot.

        Returns:
            The figure.
        """
        from lightning_graphon.plots import new_figure

        if ax is None:
            _, axes = new_figure(1, 1, cell=(5.0, 3.2))
            ax = axes[0, 0]
        _draw(ax, self.curve[~self.curve[:, 0].isnan()].cpu(), float(self.invalid), self.tolerance)
        figure: Figure = ax.figure
        return figure

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the points of another metric, or of its states."""
        super().merge_state(incoming_state)
        self._mark_updated()

    # torch and torchmetrics leave these names to subclasses; a hook in their place would have to be pickled.
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._mark_updated()

    def _mark_updated(self) -> None:
        # States came from elsewhere: drop the cached result, and let torchmetrics know that there were updates.
        self._computed = None
        self._update_count = max(self._update_count, int(self.points))


@checked
def loss_decay_summary(predicted: Tensor, observed: Tensor, step: Tensor, tolerance: float = 0.1) -> dict[str, Tensor]:
    """Compare two curves; the functional form of `LossDecay`, which names the keys.

    Args:
        predicted: Losses [K].
        observed: Losses [K].
        step: Optimizer steps [K], in any order; or times.
        tolerance: Largest relative error of a valid prediction.

    Returns:
        Dictionary of float64 scalars.

    Raises:
        ValueError: Lengths differ, or steps are not finite.

    >>> step = torch.arange(5.0)
    >>> values = loss_decay_summary(torch.exp(-0.2 * step), torch.exp(-0.1 * step), step, tolerance=0.15)
    >>> [round(values[k].item(), 3) for k in ("rate_predicted", "rate_observed", "rate_ratio", "valid_until")]
    [0.2, 0.1, 2.0, 1.0]
    """
    metric = LossDecay(tolerance=tolerance).to(predicted.device)
    metric.update(predicted, observed, step)
    values: dict[str, Tensor] = metric.compute()
    return values


def merge_latest(parts: Tensor) -> Tensor:
    """The last step, the sum of its errors and their number, from those of parts [P, 3]."""
    step = parts[:, 0].max()
    latest = parts[:, 0] == step
    return torch.cat([step[None], parts[latest, 1:].sum(0)])


def merge_curves(parts: Tensor) -> Tensor:
    """Curves [P, max_points, 3] of (step, predicted, observed) as one [max_points, 3], by step, NaN rows last."""
    return _thinned(parts.flatten(0, 1), parts.shape[1])


def _thinned(rows: Tensor, size: int) -> Tensor:
    """At most `size` rows by step; of more rows the first of each of size/2 equal ranges of steps, and the last."""
    rows = rows[~rows[:, 0].isnan()]
    rows = rows[rows[:, 0].argsort(stable=True)]
    if len(rows) > size:
        # Half the size, so that thinning is not needed again at the very next point.
        ranges = max(1, size // 2)
        fraction = (rows[:, 0] - rows[0, 0]) / (rows[-1, 0] - rows[0, 0]).clamp_min(1e-300)
        number = (fraction * ranges).floor().clamp_max(ranges - 1)
        keep = torch.cat([torch.ones_like(number[:1], dtype=torch.bool), number.diff() > 0])
        keep[-1] = True
        rows = rows[keep][-size:]
    return torch.cat([rows, rows.new_full((size - len(rows), 3), torch.nan)])


def _draw(axis: Any, curve: Tensor, invalid: float, tolerance: float) -> None:
    from lightning_graphon.plots import few_ticks

    step, predicted, observed = curve.T.tolist() if len(curve) else ([], [], [])
    axis.plot(step, observed, color="#1b1b1b", linewidth=1.6, label="observed")
    axis.plot(step, predicted, color="#c2410c", linewidth=1.6, linestyle="--", label="predicted")
    if invalid < float("inf"):
        axis.axvline(invalid, color="#888888", linewidth=0.8, linestyle=":")
        axis.axvspan(invalid, max(step), color="#888888", alpha=0.12, label=f"more than {tolerance:.0%} apart")
    shown = curve[:, 1:][curve[:, 1:].isfinite()]
    if len(shown) and bool((shown > 0).all()):
        axis.set_yscale("log")
        few_ticks(axis, float(shown.max() / shown.min()))
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8)
