"""The kernel's spectrum as a torchmetrics metric."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_graphon._shared.checks import check_choice
from lightning_graphon.ntk.operators.operator import KernelOperator
from lightning_graphon.ntk.operators.spectrum import spectral_summary

_KEYS = (
    "decay_rate", "effective_rank", "spectral_gap", "energy_top5", "lambda_max", "lambda_min", "trace",
    "condition_number",
)  # fmt: skip


class NTKSpectrum(Metric):
    r"""Mean over updates of the spectral metrics of Pham et al. (arXiv:2510.17515), Appendix D.

    As input `update` accepts

    - `kernel` (Tensor or `KernelOperator`): symmetric kernel [N, N] or [N, C, N, C], floating point.

    As output `compute` returns a dictionary of float64 scalars: `decay_rate`, `effective_rank`, `spectral_gap`,
    `energy_top5`, `lambda_max`, `lambda_min`, `trace`, `condition_number`, as defined by `spectral_summary`; a ratio
    over a zero eigenvalue is inf, and `lambda_min` is left out of the mean where an operator does not give it. `last`
    keeps this process's most recent `SpectralSummary`.

    Args:
        prefix: Prefix of every key, e.g. "ntk/".
        key: Key of the one number that `compute` returns; needed by `self.log("rank", metric)`, which takes no dict.
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: An unknown key; or from `spectral_summary`, for kernels that are not square, symmetric and finite.

    >>> metric = NTKSpectrum(prefix="ntk/")
    >>> metric.update(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])))
    >>> metric.compute()["ntk/effective_rank"].item()
    2.0
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    sums: Tensor
    counts: Tensor

    def __init__(self, prefix: str = "", key: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if key is not None:
            check_choice("key", key, _KEYS)
        self.prefix, self.key = prefix, key
        self.last: Any = None
        self.add_state("sums", torch.zeros(len(_KEYS), dtype=torch.float64), dist_reduce_fx="sum")
        # Per key, as an operator does not give all of them.
        self.add_state("counts", torch.zeros(len(_KEYS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, kernel: Tensor | KernelOperator) -> None:
        """Add one kernel."""
        self.last = spectral_summary(kernel)
        known = {**self.last.scalars(), "energy_top5": self.last.energy_concentration}
        for i, key in enumerate(_KEYS):
            if key in known:
                self.sums[i] += known[key]
                self.counts[i] += 1

    def compute(self) -> Any:
        """Means by key, or that of `key`; NaN before the first update, as torchmetrics warns."""
        means = self.sums / self.counts
        if self.key is not None:
            return means[_KEYS.index(self.key)]
        return {self.prefix + key: mean for key, mean in zip(_KEYS, means, strict=True)}
