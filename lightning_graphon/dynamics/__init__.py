"""How training goes, before it has: descent with a kernel, stability, the optimizer's step. No Lightning."""

from lightning_graphon.dynamics.decay_modes import DecayModes
from lightning_graphon.dynamics.finite_probe import LossBand, finite_probe_kernel
from lightning_graphon.dynamics.kernel_descent import LossDecayPredictor
from lightning_graphon.dynamics.optimizer import Descent, optimizer_preconditioner, read_descent
from lightning_graphon.dynamics.stability import stable_product

__all__ = [
    "DecayModes",
    "Descent",
    "LossBand",
    "LossDecayPredictor",
    "finite_probe_kernel",
    "optimizer_preconditioner",
    "read_descent",
    "stable_product",
]
