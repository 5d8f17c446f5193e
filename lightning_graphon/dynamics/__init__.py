"""How training goes, before it has: descent with a kernel, stability, the optimizer's step. Without Lightning."""

from lightning_graphon.dynamics.descent.decay_modes import DecayModes
from lightning_graphon.dynamics.descent.finite_probe import LossBand, finite_probe_kernel
from lightning_graphon.dynamics.descent.gaussian_process import GaussianPrediction, gp_posterior
from lightning_graphon.dynamics.descent.kernel_descent import LossDecayPredictor
from lightning_graphon.dynamics.descent.stability import stability_limit
from lightning_graphon.dynamics.forecast import Forecast
from lightning_graphon.dynamics.kernel_change import KernelChange
from lightning_graphon.dynamics.kernel_prediction import KernelPrediction
from lightning_graphon.dynamics.loss_curves import CURVES, LossCurves, next_multiple, relative_error
from lightning_graphon.dynamics.loss_tracker import LossTracker
from lightning_graphon.dynamics.optimizer import (
    OptimizerStep,
    OptimizerView,
    optimizer_preconditioner,
    read_optimizer_step,
)
from lightning_graphon.dynamics.predictions_ahead import PredictionsAhead
from lightning_graphon.dynamics.predictors.pool_batches import PoolBatches
from lightning_graphon.dynamics.predictors.power_law import power_law
from lightning_graphon.dynamics.predictors.predicted_loss import PredictedLoss, first_outside, lazy_until
from lightning_graphon.dynamics.predictors.sibling import (
    Sibling,
    redraw_from_graphons,
    scale_updates,
    sibling_optimizer,
)
from lightning_graphon.dynamics.predictors.taylor import Expansion, linearize, taylor_expand, taylor_expand_
from lightning_graphon.dynamics.predictors.trained_copies import rehearse, replay, train_copies
from lightning_graphon.dynamics.predictors.training import Training
from lightning_graphon.dynamics.predictors.width_scaling import extrapolate_widths
from lightning_graphon.dynamics.probed_network import ProbedNetwork, UnsupportedTrainingError

__all__ = [
    "CURVES",
    "DecayModes",
    "Expansion",
    "Forecast",
    "GaussianPrediction",
    "KernelChange",
    "KernelPrediction",
    "LossBand",
    "LossCurves",
    "LossDecayPredictor",
    "LossTracker",
    "OptimizerStep",
    "OptimizerView",
    "PoolBatches",
    "PredictedLoss",
    "PredictionsAhead",
    "ProbedNetwork",
    "Sibling",
    "Training",
    "UnsupportedTrainingError",
    "extrapolate_widths",
    "finite_probe_kernel",
    "first_outside",
    "gp_posterior",
    "lazy_until",
    "linearize",
    "next_multiple",
    "optimizer_preconditioner",
    "power_law",
    "read_optimizer_step",
    "redraw_from_graphons",
    "rehearse",
    "relative_error",
    "replay",
    "scale_updates",
    "sibling_optimizer",
    "stability_limit",
    "taylor_expand",
    "taylor_expand_",
    "train_copies",
]
