r"""Squared error mode by mode, in closed form.

With Θu_i = λ_i u_i and a loss ½c‖f − y‖² (c = 2/(N·C) for torch's `mse_loss`) every coefficient of the residual
decays on its own:

.. math:: r_i(t) = r_i(0) e^{-ηcλ_i t} \text{ (flow)}, \qquad r_i(t) = r_i(0) (1 - ηcλ_i)^t \text{ (descent)}

(Jacot et al. 2018, section 5; Lee et al. 2019, eq. 10). With momentum the pair (residual, buffer) of a mode is
multiplied by one 2 by 2 matrix a step.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_graphon.dynamics.descent.output_loss import SquaredError
from lightning_graphon.dynamics.descent.stability import stability_limit
from lightning_graphon.ntk.operators.output_kernel import Eigen

Times = float | int | Sequence[float] | Tensor
_NEGATIVE = 1e-6  # of λ_max: more negative than this is no rounding


@dataclass(frozen=True)
class DecayModes:
    """How fast each mode of a squared error falls, and how much of the loss it holds.

    Attributes:
        eigenvalues: λ of the kernel, descending: [N] where all outputs share the kernel, else [N·C].
        rates: decay rate 2cλ of the mode's part of the loss, per unit of learning rate × steps.
        shares: part of the initial loss (above its floor) in each mode; they sum to 1, or are 0 at a perfect
            fit.
    """

    eigenvalues: Tensor
    rates: Tensor
    shares: Tensor

    def top_share(self, k: int = 5) -> float:
        """Part of the initial loss in the k modes that fall fastest."""
        return float(self.shares[:k].sum())


@dataclass(frozen=True)
class ClosedForm:
    """A squared error under a frozen kernel at any time.

    Attributes:
        eigen: modes, eigenvalues clipped at 0.
        square: the loss.
        coefficients: of the initial residual.
    """

    eigen: Eigen
    square: SquaredError
    coefficients: Tensor

    @classmethod
    def from_eigen(cls, eigen: Eigen, square: SquaredError) -> "ClosedForm":
        """Clip what is zero to working precision, with a word where more than rounding is clipped."""
        values, top = eigen.values, float(eigen.values.max())
        if float(values.min()) < -_NEGATIVE * abs(top):
            warnings.warn(
                f"the kernel's smallest eigenvalue is {float(values.min()):.3g} with λ_max = {top:.3g}; the closed "
                "form takes negative eigenvalues as 0, step() does not",
                stacklevel=5,
            )
        floor = max(top, 0.0) * len(values) * torch.finfo(values.dtype).eps
        clean = replace(eigen, values=torch.where(values > floor, values, 0.0))
        return cls(clean, square, clean.project(square.residual))

    def modes(self) -> DecayModes:
        """Eigenvalues, rates and shares, the fastest first."""
        energy = self._energy()
        values = self.eigen.values.flatten()
        order = values.argsort(descending=True, stable=True)
        total = energy.sum()
        shares = energy.flatten()[order] / total if float(total) > 0 else torch.zeros_like(values)
        return DecayModes(values[order], 2 * self.square.curvature * values[order], shares)

    def loss(self, left: Tensor) -> Tensor:
        """Loss [T] where the fractions `left` [T, K, *] of the modes remain."""
        energy = self._energy()
        # A mode without energy stays without, however far it would have diverged.
        parts = torch.where(energy > 0, energy * left.square(), 0.0)
        return self.square.floor + 0.5 * self.square.curvature * parts.flatten(1).sum(1)

    def outputs(self, start: Tensor, left: Tensor) -> Tensor:
        """Outputs [T, N, C]."""
        gone = torch.where(self.coefficients != 0, self.coefficients * (left - 1), 0.0)
        return start + self.eigen.expand(gone, start.shape[1])

    def pushes(self, learned: Tensor, outputs: int) -> Tensor:
        """s(t) with f(t) = f_0 − Θ s(t), [T, N, C]; for test points f_0 − Θ_test s(t).

        Modes with λ = 0 are left out: a kernel over train and test points together that is positive semi-definite
        does not carry them to the test points.
        """
        gone = torch.where(self.coefficients != 0, self.coefficients * self.gains(learned), 0.0)
        return self.eigen.expand(gone, outputs)

    def gains(self, learned: Tensor) -> Tensor:
        """Factors [T, K, *] from a mode's initial residual to its push: the fraction learned over λ; 0 where λ = 0."""
        inverse = torch.where(self.eigen.values > 0, 1 / self.eigen.values, 0.0)
        return torch.where(inverse > 0, learned * inverse, 0.0)

    def _energy(self) -> Tensor:
        shared = self.eigen.values.shape[1] == 1
        return self.coefficients.square().sum(1, keepdim=True) if shared else self.coefficients.square()


def as_times(times: Times, like: Tensor, whole: bool) -> Tensor:
    """Times [T] in float64.

    Raises:
        ValueError: negative or NaN; or fractions where whole steps are meant.
    """
    given = torch.as_tensor(times, dtype=torch.float64).reshape(-1).to(like.device)
    if not bool((given >= 0).all()):
        raise ValueError("times must be 0 or more, infinity included")
    if whole and not bool((given == given.floor()).all()):
        raise ValueError("descent takes whole steps; pass flow=True for fractions of a step")
    return given


def descent_residual_factors(speed: Tensor, steps: Tensor, momentum: float, nesterov: bool, dampening: float) -> Tensor:
    """Fraction of each mode's residual after SGD steps with speed = ηcλ, [T, K, *]."""
    if momentum == 0:
        left = torch.pow(1 - speed, steps.reshape(-1, 1, 1))
    else:
        limit = stability_limit(momentum, nesterov, dampening)
        fractions = [_two_step(speed, t, momentum, nesterov, dampening, limit) for t in steps.tolist()]
        left = torch.stack(fractions) if fractions else speed.new_zeros(0, *speed.shape)
    return torch.where(speed == 0, 1.0, left)


def _two_step(speed: Tensor, t: float, momentum: float, nesterov: bool, dampening: float, limit: float) -> Tensor:
    if t == 0:
        return torch.ones_like(speed)
    if t == float("inf"):
        return torch.where(speed < limit, 0.0, torch.inf)
    first = _matrix(speed, momentum, nesterov, 0.0)[..., :, 0]  # SGD's first buffer is the gradient, undampened
    later = torch.linalg.matrix_power(_matrix(speed, momentum, nesterov, dampening), int(t) - 1)
    return (later[..., 0, :] * first).sum(-1)


def _matrix(speed: Tensor, momentum: float, nesterov: bool, dampening: float) -> Tensor:
    """One step on (residual, buffer), [..., 2, 2]."""
    buffer = (torch.full_like(speed, 1 - dampening), torch.full_like(speed, momentum))
    # The step taken is the buffer, or gradient + momentum × buffer for Nesterov.
    move = (1 + momentum * buffer[0], momentum * buffer[1]) if nesterov else buffer
    rows = [torch.stack([1 - speed * move[0], -speed * move[1]], -1), torch.stack(buffer, -1)]
    return torch.stack(rows, -2)
