r"""Infinitely wide networks as Gaussian processes: Bayesian posterior, and ensembles at any time of training.

With the kernel K of the outputs at initialisation (NNGP), the tangent kernel Θ, train points d and test points t:

.. math::
    \text{Bayes:}\quad & μ = K_{td} (K_{dd} + ρ)^{-1} y, \qquad Σ = K_{tt} - K_{td} (K_{dd} + ρ)^{-1} K_{dt} \\
    \text{ensemble:}\quad & μ = G y, \qquad Σ = K_{tt} - G K_{dt} - K_{td} G^T + G K_{dd} G^T, \qquad
    G = Θ_{td} (Θ_{dd} + ρ)^{-1} (1 - e^{-c (Θ_{dd} + ρ) t})

(Lee et al. 2018, eq. 8 and 9; Lee et al. 2019, eq. 15 and 16). Bayes with Θ in place of K is the NTK-GP (He et al.
2020).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.dynamics.descent.decay_modes import Times
from lightning_graphon.dynamics.descent.kernel_descent import LossDecayPredictor
from lightning_graphon.dynamics.descent.output_loss import LossFn
from lightning_graphon.dynamics.descent.spread import check_positive
from lightning_graphon.ntk.operators.output_kernel import symmetrised


@dataclass(frozen=True)
class GaussianPrediction:
    """Outputs of test points under a Gaussian process; float64.

    Attributes:
        mean: [M, ...] as the targets' [N, ...]; with a leading T for several times.
        covariance: [M, M] of every output, or [C, M, M] where each has its own; with a leading T for several times.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """Variances [M] or [C, M], with a leading T for several times; never negative."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)


@checked
def gp_posterior(
    prior: Tensor,
    targets: Tensor,
    *,
    ntk: Tensor | None = None,
    times: Times = math.inf,
    lr: float | None = None,
    ridge: float = 0.0,
    loss_fn: LossFn = torch.nn.functional.mse_loss,
) -> GaussianPrediction:
    """Mean and covariance of infinitely wide networks' outputs at test points, given train points.

    Kernels are between all points at once, the N train points first, then the M test points, as
    `graphon_ntk_from_model(model, torch.cat([x, x_test]), get=...)` gives them.

    - `gp_posterior(nngp, y)` is the Bayesian posterior of the network; `gp_posterior(ntk, y)` that of the NTK-GP.
    - `gp_posterior(nngp, y, ntk=ntk, times=...)` is the ensemble of networks that start differently and are all trained
      on the squared error: the prior at time 0. Only the last layer is trained where `ntk` is the NNGP itself; the
      limit of long training is then the Bayesian posterior without noise.

    The kernel is decomposed once for all times; O((N + M)³).

    Args:
        prior: Covariance of the outputs before they see targets, [N + M, N + M], or [C, N + M, N + M] of each output.
        targets: Of the train points, floating point [N] or [N, ...].
        ntk: Tangent kernel Θ, of the same shapes, in the parameterisation that is trained.
        times: Of the ensemble, one or several, infinity included: learning rate × steps of gradient flow, or with
            `lr` numbers of steps.
        lr: Learning rate of gradient descent in whole steps; None is gradient flow.
        ridge: Number ρ added to the diagonal between train points, in the kernel's units: for Bayes the variance of the
            targets' noise, for the ensemble the loss has ρ c/2 times the squared distance from the initial weights
            beside it.
        loss_fn: The squared error that is trained, whose constant c sets the unit of time: 2/(N·C) for `mse_loss`.

    Returns:
        A `GaussianPrediction`, its covariance positive semi-definite. Directions of Θ below rounding are not learned.

    Raises:
        ValueError: Shapes; kernels that are not finite, symmetric or positive semi-definite; a negative ridge; times
            without `ntk`, or that are negative, or no whole steps; a learning rate at which descent diverges; or a loss
            that is no squared error.

    >>> kernel = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> posterior = gp_posterior(kernel, torch.tensor([1.0]))
    >>> posterior.mean, posterior.variance  # 1/2 · 1 and 2 - 1/2
    (tensor([0.5000], dtype=torch.float64), tensor([1.5000], dtype=torch.float64))
    >>> gp_posterior(kernel, torch.tensor([1.0]), ntk=kernel, times=[0, torch.inf]).variance[:, 0]
    tensor([2.0000, 1.5000], dtype=torch.float64)
    """
    _check(prior, targets, ridge)
    n, bayes = len(targets), ntk is None
    if bayes and (lr is not None or times != math.inf):
        raise ValueError("the Bayesian posterior has no times; give ntk, the kernel of the training")
    prior = _joint(prior, targets, "prior")
    theta = prior if ntk is None else _joint(ntk, targets, "ntk")
    if ntk is not None:
        check_positive(torch.linalg.eigvalsh(theta), "ntk")
    noisy = _with_ridge(theta, n, ridge)
    predictor = _predictor(noisy, targets, loss_fn)
    if lr is not None and lr >= predictor.max_learning_rate():
        raise ValueError(f"lr must be below {predictor.max_learning_rate():.4g}, or descent diverges; got {lr:.4g}")
    rate, flow = (1.0, True) if lr is None else (lr, False)
    # Noise of the targets adds to that of the initial outputs which they are compared with.
    mean = predictor.predict_test_outputs(times, rate, flow=flow)
    covariance = predictor.predict_test_covariance(times, rate, noisy if bayes else prior, flow=flow)
    one = torch.as_tensor(times).ndim == 0
    return GaussianPrediction(mean[0], covariance[0]) if one else GaussianPrediction(mean, covariance)


def _check(prior: Tensor, targets: Tensor, ridge: float) -> None:
    if not targets.is_floating_point() or targets.numel() == 0:
        raise ValueError(
            "targets must be floating point [N, ...] with N > 0; `one_vs_rest_targets` makes them from class numbers"
        )
    if not bool(targets.isfinite().all()):
        raise ValueError("targets must be finite")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be a finite number >= 0, got {ridge!r}")


def _joint(kernel: Tensor, targets: Tensor, name: str) -> Tensor:
    """A kernel between train and test points, float64, symmetrised.

    Raises:
        ValueError: It does not fit the targets, or is not finite or not symmetric.
    """
    n, outputs = len(targets), targets[0].numel()
    square = kernel.ndim in (2, 3) and kernel.shape[-1] == kernel.shape[-2] > n
    if not square or (kernel.ndim == 3 and len(kernel) != outputs):
        raise ValueError(
            f"{name} must be [{n} + M, {n} + M], the {n} train points of the targets and M test points, or "
            f"[{outputs}, {n} + M, {n} + M] for one per output, got {list(kernel.shape)}"
        )
    if not bool(kernel.isfinite().all()):
        raise ValueError(f"{name} has entries that are not finite; look for NaN or overflow in the model")
    return symmetrised(kernel.detach().to(torch.float64))


def _with_ridge(kernel: Tensor, train: int, ridge: float) -> Tensor:
    diagonal = torch.zeros(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    diagonal[:train] = ridge
    return kernel + torch.diag(diagonal)


def _predictor(theta: Tensor, targets: Tensor, loss_fn: LossFn) -> LossDecayPredictor:
    """The predictor of the mean, whose outputs start at 0."""
    n = len(targets)
    y = targets.detach().to(theta)
    there = y.new_zeros(theta.shape[-1] - n, *y.shape[1:])
    return LossDecayPredictor(
        theta[..., :n, :n], torch.zeros_like(y), y, loss_fn,
        test_kernel=theta[..., n:, :n], test_outputs=there, test_targets=there,
    )  # fmt: skip
