"""How training goes, before it has: descent with a kernel, stability, the optimizer's step. No Lightning."""

from lightning_graphon.dynamics.decay_modes import DecayModes
from lightning_graphon.dynamics.finite_probe import LossBand, finite_probe_kernel
from lightning_graphon.dynamics.kernel_descent import LossDecayPredictor
from lightning_graphon.dynamics.optimizer import OptimizerStep, optimizer_preconditioner, read_optimizer_step
from lightning_graphon.dynamics.stability import stability_limit

__all__ = [
    "DecayModes",
    "LossBand",
    "LossDecayPredictor",
    "OptimizerStep",
    "finite_probe_kernel",
    "optimizer_preconditioner",
    "read_optimizer_step",
    "stability_limit",
]
