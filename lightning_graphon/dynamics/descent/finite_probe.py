r"""The bias of a finite probe, and the band of two predictions that bracket the truth.

N probe points stand for D training points. The plain prediction weighs the kernel's self-terms with 1/N where
training weighs them with 1/D: the probe fits itself too well and the predicted loss falls too fast. Keeping the
self-terms at 1/D and scaling the others to (D−1)/(D(N−1)) leaves every row's total weight as it is and errs the
other way: the probe points then hardly learn from themselves. The two close as N grows to D.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.dynamics.descent.kernel_descent import LossDecayPredictor
from lightning_graphon.dynamics.descent.output_loss import LossFn, as_output_matrix
from lightning_graphon.ntk.operators.operator import KernelOperator, KroneckerKernel
from lightning_graphon.ntk.operators.output_kernel import output_kernel


@checked
def finite_probe_kernel(
    kernel: Tensor | KernelOperator, outputs: Tensor, dataset_size: int, *, positive: bool = False
) -> Tensor | KroneckerKernel:
    """The kernel with self-terms at 1/D and the others scaled to keep each row's weight.

    To be used with the probe's own mean loss, whose gradient carries 1/N: self-terms are multiplied by N/D, all
    others by N(D−1)/(D(N−1)).

    Args:
        kernel: [N, N], [C, N, N], [N, C, N, C] or [N·C, N·C], a `KroneckerKernel`, or another operator, which is
            written out. The self-terms are those of one sample with itself, between all its outputs.
        outputs: a batch of outputs [N, ...], which tells the shapes apart.
        dataset_size: D, the number of training points that the probe stands for.
        positive: replace negative eigenvalues by 0, the nearest positive semi-definite kernel. Removing self-terms
            makes small modes negative, and over long times these would grow without bound. What the probe points do not
            learn from each other then stays as it is: in our measurements the best single prediction of training on
            D points.

    Returns:
        float64 [N, N], [C, N, N] or [N·C, N·C]; for a `KroneckerKernel` another one.

    Raises:
        ValueError: D < N, or the kernel does not fit.

    >>> finite_probe_kernel(torch.ones(2, 2), torch.zeros(2, 1), dataset_size=4)
    tensor([[0.5000, 1.5000],
            [1.5000, 0.5000]], dtype=torch.float64)
    """
    field = as_output_matrix(outputs)
    n, d = len(field), dataset_size
    if d < n:
        raise ValueError(f"dataset_size is the number of training points, at least the {n} of the probe, got {d}")
    read = output_kernel(kernel, field).dense(field)
    assert isinstance(read.kernel, Tensor)  # noqa: S101
    others = n * (d - 1) / (d * (n - 1)) if n > 1 else 1.0
    weight = torch.full((n, n), others, dtype=field.dtype, device=field.device)
    weight.fill_diagonal_(n / d)
    if read.form == "full":
        weight = weight.repeat_interleave(read.outputs, 0).repeat_interleave(read.outputs, 1)
    corrected = read.kernel * weight
    if positive:
        values, vectors = torch.linalg.eigh(corrected)
        corrected = (vectors * values.clamp_min(0)[..., None, :]) @ vectors.mT
    return corrected if read.mixing is None else KroneckerKernel(corrected, read.mixing)


class LossBand:
    """The plain and the corrected prediction side by side, and the band between them.

    Args:
        kernel: as in `LossDecayPredictor`.
        outputs: f_0 of the probe, [N, ...].
        targets: second argument of `loss_fn`.
        loss_fn: (outputs, targets) to a scalar tensor.
        dataset_size: D, the number of training points that the probe stands for. D = N closes the band.
        options: passed on to both predictors (momentum, ...).

    Attributes:
        plain: `LossDecayPredictor` with the kernel as given; falls too fast.
        corrected: `LossDecayPredictor` with `finite_probe_kernel`; falls too slowly.

    Raises:
        ValueError: as `LossDecayPredictor` and `finite_probe_kernel`.

    >>> band = LossBand(torch.eye(2), torch.zeros(2, 1), torch.ones(2, 1), torch.nn.functional.mse_loss, dataset_size=4)
    >>> band.step(0.1)
    >>> [round(x, 6) for x in (band.lower, band.upper)]
    [0.81, 0.9025]
    """

    @checked
    def __init__(
        self, kernel: Tensor | KernelOperator, outputs: Tensor, targets: Any, loss_fn: LossFn, *,
        dataset_size: int, **options: Any,
    ) -> None:  # fmt: skip
        corrected = finite_probe_kernel(kernel, outputs, dataset_size)
        self.plain = LossDecayPredictor(kernel, outputs, targets, loss_fn, **options)
        # One of the two warns of an unstable learning rate: the plain one.
        self.corrected = LossDecayPredictor(corrected, outputs, targets, loss_fn, **{**options, "check_every": 0})

    @property
    def lower(self) -> float:
        """Smaller of the two predicted losses now."""
        return min(self.plain.loss, self.corrected.loss)

    @property
    def upper(self) -> float:
        """Larger of the two predicted losses now."""
        return max(self.plain.loss, self.corrected.loss)

    def step(self, lr: float, *, momentum: float | None = None) -> None:
        """Advance both by one optimizer step; arguments as in `LossDecayPredictor.step`."""
        self.plain.step(lr, momentum=momentum)
        self.corrected.step(lr, momentum=momentum)

    def run(self, lrs: Iterable[float]) -> tuple[Tensor, Tensor]:
        """Step through a schedule.

        Returns:
            Lower and upper losses, each [T + 1], float64 on the CPU, the current ones first.
        """
        rates = list(lrs)
        both = torch.stack([self.plain.run(rates), self.corrected.run(rates)])
        return both.amin(0), both.amax(0)
