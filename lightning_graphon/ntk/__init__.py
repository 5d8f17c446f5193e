"""Kernels: infinite width, finite width, spectra, dynamics. Needs torch and scipy only."""

from lightning_graphon.ntk.activations import dual_activation, register_activation, unregister_activation
from lightning_graphon.ntk.descent import Descent, optimizer_preconditioner, read_descent
from lightning_graphon.ntk.design import DesignedGraphons, design_graphons
from lightning_graphon.ntk.dual import DualActivation
from lightning_graphon.ntk.dual_hermite import HermiteDual
from lightning_graphon.ntk.dual_relu import PiecewiseLinear, ReLULike
from lightning_graphon.ntk.dynamics import LossDecayPredictor
from lightning_graphon.ntk.empirical import LayerShare, empirical_ntk, ntk_layer_shares
from lightning_graphon.ntk.empirical_operator import EmpiricalNTK, kronecker_ntk
from lightning_graphon.ntk.finite_probe import LossBand, finite_probe_kernel
from lightning_graphon.ntk.from_model import graphon_ntk_from_model
from lightning_graphon.ntk.generalisation import (
    GeneralisationBound,
    generalisation_bound,
    kernel_ridge_regression,
    signed_targets,
)
from lightning_graphon.ntk.infinite import graphon_ntk
from lightning_graphon.ntk.modes import DecayModes
from lightning_graphon.ntk.operator import DenseOperator, KernelOperator, KroneckerKernel, top_eigenpairs
from lightning_graphon.ntk.sharing import Share, world_share
from lightning_graphon.ntk.spectrum import SpectralSummary, kernel_target_alignment, spectral_summary
from lightning_graphon.ntk.stability import stable_product

__all__ = [
    "DecayModes",
    "DenseOperator",
    "Descent",
    "DesignedGraphons",
    "DualActivation",
    "EmpiricalNTK",
    "GeneralisationBound",
    "HermiteDual",
    "KernelOperator",
    "KroneckerKernel",
    "LayerShare",
    "LossBand",
    "LossDecayPredictor",
    "PiecewiseLinear",
    "ReLULike",
    "Share",
    "SpectralSummary",
    "design_graphons",
    "dual_activation",
    "empirical_ntk",
    "finite_probe_kernel",
    "generalisation_bound",
    "graphon_ntk",
    "graphon_ntk_from_model",
    "kernel_ridge_regression",
    "kernel_target_alignment",
    "kronecker_ntk",
    "ntk_layer_shares",
    "optimizer_preconditioner",
    "read_descent",
    "register_activation",
    "signed_targets",
    "spectral_summary",
    "stable_product",
    "top_eigenpairs",
    "unregister_activation",
    "world_share",
]
