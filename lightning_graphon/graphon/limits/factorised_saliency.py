"""Predicted limits: the factorised saliency model, its fit to the scores of a layer, and the graphon it implies.

[P2] is Pham, Ta, Tran-Thanh, *Pruning at Initialisation through the lens of Graphon Limit*, ICML 2026,
arXiv:2602.06675. Its model is S_ij = a_i b_j ξ_ij with i.i.d. noise ξ; at the threshold τ the masks tend to the
graphon W(u, v) = P(a(u) b(v) ξ > τ).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from scipy.stats import ks_2samp
from torch import Tensor

from lightning_graphon._shared.checks import check_choice, check_sparsity, checked
from lightning_graphon._shared.choices import LimitAllocation, Order
from lightning_graphon.graphon.core.step_graphon import StepGraphon
from lightning_graphon.graphon.distances.distances import l2_distance
from lightning_graphon.graphon.estimation.estimate import estimate_graphon
from lightning_graphon.graphon.limits.scaled_saliency import ScaledSaliency, common_threshold, finite_float64, quantiles

_MAX_ROUNDS = 50
_GROUPS = 4  # of rows and of columns, by factor
_SAMPLE = 1 << 16


@dataclass(frozen=True, init=False)
class FactorisedSaliency(ScaledSaliency):
    """The model S_ij = a_i b_j ξ_ij of [P2]: a row factor times a column factor times i.i.d. noise.

    Args:
        row_factors: Factors a [out], not negative; 0 for an output whose scores are all zero.
        col_factors: Factors b [in, *taps], not negative.
        noise: Sample [k] of ξ, in any order.
        explained: Share of the variance of log |S| that fitted factors explain.
        noise_ks: Misfit of i.i.d. noise after a fit; see `fit_factorised_saliency`.

    Raises:
        ValueError: A factor is negative or not finite, or the noise is empty or not finite.

    Example:
        One round of SynFlow is this model: the factors are sums over paths from the outputs and from the inputs, the
        noise is |w|.

        >>> S = FactorisedSaliency(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), torch.arange(1.0, 101.0))
        >>> S.probabilities(120.0)
        tensor([[0.0000, 0.6000],
                [0.4000, 0.8000]], dtype=torch.float64)
        >>> S.graphon(density=0.5)
        StepGraphon(rows=2, cols=2, density=0.5)
    """

    row_factors: Tensor
    col_factors: Tensor
    explained: float
    noise_ks: float

    def __init__(
        self, row_factors: Tensor, col_factors: Tensor, noise: Tensor, explained: float = 1.0, noise_ks: float = 0.0
    ) -> None:
        rows, cols = finite_float64("row_factors", row_factors), finite_float64("col_factors", col_factors)
        fields = {"row_factors": rows, "col_factors": cols, "explained": explained, "noise_ks": noise_ks}
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        super().__init__(torch.tensordot(rows, cols, dims=0), noise)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"FactorisedSaliency({shape}, explained={self.explained:.3f}, noise_ks={self.noise_ks:.3f})"


@checked
def fit_factorised_saliency(scores: Tensor) -> FactorisedSaliency:
    """Fit S_ij = a_i b_j ξ_ij to the scores of one layer by median polish of log |S| (Tukey 1977).

    Row and column medians of log |S| are subtracted in turn until they are zero. Zeros say nothing about the size of a
    factor: a row or column of zeros (a dead unit, an input that is always zero) has the factor 0, other zeros are zeros
    of the noise. Signed scores (GraSP) keep their sign in the noise. The factors have median 1 over the units that are
    not dead; the noise carries the scale. Scores without structure give equal factors at any width, because effects
    are shrunk by what chance explains of their variance (James and Stein 1961).

    How well it fits:

    * `explained` is 1 − Var(log |ξ|) / Var(log |S|) over scores that are not zero. The noise is part of the model:
      the logarithm of |w| for normal w has the variance π²/8 that no factors can explain. So a small value means that
      there is little structure (magnitude: 0), not that the fit is bad.
    * `noise_ks` measures the assumption that the noise is i.i.d.: rows and columns are divided into four groups by
      their factor, and it is the largest Kolmogorov-Smirnov distance between the noise in one of the 16 cells and all
      of it. By chance it is up to 1.9 / √(entries of a cell, at most 65,536), and the errors of the factors add up to
      0.6 / √out + 0.6 / √in.

    Args:
        scores: Scores [out, in, *taps] of a pruning method; each tap is a column of its own.

    Raises:
        ValueError: Fewer than two axes, an empty axis, or a score that is not finite.

    Example:
        >>> source = torch.Generator().manual_seed(0)
        >>> a, b = torch.linspace(1, 3, 400), torch.linspace(2, 1, 300)
        >>> fit = fit_factorised_saliency(a[:, None] * b * torch.randn(400, 300, generator=source).abs())
        >>> torch.allclose(fit.row_factors, (a / a.median()).double(), rtol=0.3)  # 3 standard errors of a median
        True
    """
    scores = finite_float64("scores", scores, dims=2)
    flat = scores.flatten(1)
    logs = flat.abs().log()
    logs[flat == 0] = torch.nan
    total = _variance(logs)
    # A median has nearly the standard error of the mean for log |normal| (1.17 against 1.11 over √n) and stands any
    # fraction of outliers below one half. From here on `logs` are the residuals.
    rows, cols = _median_polish(logs)
    rows, cols = _shrink(rows, logs, 0), _shrink(cols, logs, 1)
    a, b = rows.exp().nan_to_num(0.0), cols.exp().nan_to_num(0.0)
    explained = 1 - _variance(logs) / total if total > 0 else 1.0
    live_rows, live_cols = a > 0, b > 0  # dead units have no noise
    if not bool(live_rows.any()):
        return FactorisedSaliency(a, b.view(scores.shape[1:]), a.new_zeros(1))
    noise = (logs.exp().nan_to_num_(0.0) * flat.sign())[live_rows][:, live_cols]
    misfit = _worst_ks(noise, a[live_rows], b[live_cols])
    return FactorisedSaliency(a, b.view(scores.shape[1:]), noise, explained, misfit)


def _median_polish(table: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column effects of an additive table with missing (NaN) entries; the table becomes the residuals.

    Rows and columns without any entry have the effect NaN.
    """
    rows, cols = table.new_zeros(table.shape[0]), table.new_zeros(table.shape[1])
    # A tenth of the standard error of a median over the longer side: smaller steps are below the noise.
    tolerance = 0.1 / max(table.shape) ** 0.5
    for _ in range(_MAX_ROUNDS):
        row_step = table.nanmedian(1).values
        table -= row_step[:, None]
        col_step = table.nanmedian(0).values
        table -= col_step
        rows, cols = rows + row_step, cols + col_step
        if not bool((col_step.abs() > tolerance).any()):
            break
    return rows, cols


def _shrink(effects: Tensor, table: Tensor, axis: int) -> Tensor:
    """Effects of one axis about their median, shrunk by what chance explains; the residuals take up the rest."""
    level = effects.nanmedian()
    centred = effects - level
    live = centred[~centred.isnan()]
    # The expected variance of medians of n residuals without any effect, relative to the variance found, is chance.
    entries = int((~table.isnan()).count_nonzero())
    spread = float(live.var(correction=0)) if len(live) else 0.0
    kept = max(0.0, 1 - _median_variance(table) * len(live) / max(entries, 1) / spread) if spread > 0 else 1.0
    table += (effects - kept * centred).unsqueeze(1 - axis)
    return kept * centred


def _median_variance(table: Tensor) -> float:
    """n times the variance of the median of n residuals, 1 / (4 f²) with their density f at the centre."""
    sample = quantiles(table[~table.isnan()])
    if not len(sample):
        return 0.0
    inner = sample[int(0.4 * len(sample)) : int(0.6 * len(sample)) + 1]
    return float((inner[-1] - inner[0]) / 0.2) ** 2 / 4


def _variance(table: Tensor) -> float:
    values = table[~table.isnan()]
    return float(values.var(correction=0)) if len(values) else 0.0


def _worst_ks(noise: Tensor, row_factors: Tensor, col_factors: Tensor) -> float:
    """Largest Kolmogorov-Smirnov distance between the noise in a cell of factors and all of it."""
    pooled = quantiles(noise).cpu().numpy()
    groups = [factors.argsort().chunk(_GROUPS) for factors in (row_factors, col_factors)]
    cells = (noise[rows][:, cols].flatten() for rows in groups[0] for cols in groups[1])
    thinned = (cell[:: max(1, len(cell) // _SAMPLE)].cpu().numpy() for cell in cells)
    # No p-value is wanted, and the asymptotic one costs least.
    return max(float(ks_2samp(cell, pooled, method="asymp").statistic) for cell in thinned)


@checked
def predicted_graphons(
    layers: Mapping[str, Tensor | ScaledSaliency],
    sparsity: float,
    *,
    allocation: LimitAllocation = "global",
    bins: int | Sequence[int] = 64,
    order: Order = "degree",
) -> dict[str, StepGraphon]:
    """The graphons to which the masks of a pruning method converge, from the scores of one network.

    A method scores every weight and keeps the largest. If the scores of a layer are scales times i.i.d. noise, the
    masks converge to W(u, v) = P(s(u, v) ξ > τ), with the threshold τ that keeps the given fraction of weights. How
    good the assumption is:

    * random, magnitude of i.i.d. weights: exact, the graphon of each layer is constant;
    * SynFlow, one round: exact, with the sums over paths as factors. Its usual 100 rounds are not one-shot; predict
      them with the scales min over rounds k of a_i b_j / τ_k and the threshold 1 (docs/reference/theory-limits.md);
    * SNIP, and GraSP by absolute value: the scale is the gradient, a sum over the samples of outer products. A
      `ScaledSaliency` with that gradient is right in the limit of wide layers; factors are an approximation for more
      than one sample.

    Args:
        layers: Name to scores [out, in, *taps], to which `fit_factorised_saliency` is applied, or to a model.
        sparsity: Fraction of all these weights that is removed, in [0, 1).
        allocation: "global" has one threshold for all layers, "uniform" removes the same fraction of each.
        bins: Cells of each axis, as in `estimate_graphon`.
        order: "degree" or "none", as in `estimate_graphon`.

    Returns:
        Graphons by the same names, float64.

    Raises:
        ValueError: An unknown allocation, no layer, a sparsity out of range, or scores that cannot be fitted (the
            message names the layer).

    Example:
        >>> source = torch.Generator().manual_seed(0)
        >>> weights = {"narrow": torch.randn(40, 50, generator=source), "wide": torch.randn(80, 90, generator=source)}
        >>> W = predicted_graphons({n: w.abs() for n, w in weights.items()}, sparsity=0.9, bins=8)
        >>> round(sum(W[n].density * w.numel() for n, w in weights.items()))  # of 9,200 weights
        920
    """
    check_choice("allocation", allocation, get_args(LimitAllocation))
    density = 1 - check_sparsity(sparsity)
    if not layers:
        raise ValueError("layers is empty: give the scores of at least one layer by name")
    models = {name: _model(name, layer) for name, layer in layers.items()}
    if allocation == "uniform":
        return {name: model.graphon(density=density, bins=bins, order=order) for name, model in models.items()}
    threshold = common_threshold(list(models.values()), density)
    return {name: model.graphon(threshold=threshold, bins=bins, order=order) for name, model in models.items()}


@checked
def limit_distances(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], bins: int = 64) -> dict[str, float]:
    """L2 distance between the graphon of each mask and the limit that its layer's scores predict.

    The prediction uses factors fitted to the scores, at the density of the mask. Chance alone gives up to
    √(p (1 − p) (1/out + 1/in + bins² / (out · in))) for a constant graphon p: the scatter of the degrees, by which the
    mask is sorted, and of the cells.

    Args:
        scores: Name to scores of the round that gave the masks.
        masks: Name to bool mask of the same shape.
        bins: Cells of each axis.

    Raises:
        ValueError: Scores that cannot be fitted; the message names the layer.

    >>> scores = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    >>> limit_distances({"fc": scores}, {"fc": scores > 0.8}, bins=4)["fc"] < 0.08  # by chance up to 0.075
    True
    """
    if missing := masks.keys() - scores.keys():
        raise KeyError(f"scores of {min(missing)!r} are missing: give those of every layer in masks")
    return {
        name: l2_distance(
            _model(name, scores[name]).graphon(density=float(mask.double().mean()), bins=bins),
            estimate_graphon(mask, bins),
        )
        for name, mask in masks.items()
    }


@checked
def score_limits(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], bins: int = 16) -> dict[str, StepGraphon]:
    """The limit that the scores of each layer predict at the density of its mask, sorted by degree.

    Args:
        masks: Name to bool mask.
        scores: Name to scores of the same shape, of the round that gave the masks; layers without any are left out.
        bins: Cells of each axis.

    Raises:
        ValueError: Scores that cannot be fitted; the message names the layer.

    >>> scores = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    >>> mask = scores > 0.8
    >>> abs(score_limits({"fc": mask}, {"fc": scores}, bins=4)["fc"].density - float(mask.double().mean())) < 1e-3
    True
    """
    return {
        name: _model(name, scores[name]).graphon(density=float(mask.double().mean()), bins=bins)
        for name, mask in masks.items()
        if name in scores
    }


def _model(name: str, layer: Tensor | ScaledSaliency) -> ScaledSaliency:
    if isinstance(layer, ScaledSaliency):
        return layer
    try:
        return fit_factorised_saliency(layer)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
