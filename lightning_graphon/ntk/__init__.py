"""Tangent kernels: infinite width, finite width, their spectra, generalisation. Needs torch and scipy only."""

from lightning_graphon.ntk.activations.base import DualActivation, HermiteDual
from lightning_graphon.ntk.activations.piecewise_linear import PiecewiseLinear, ReLULike
from lightning_graphon.ntk.activations.registry import dual_activation, register_activation, unregister_activation
from lightning_graphon.ntk.empirical import (
    EmpiricalNTK,
    LayerShare,
    empirical_nngp,
    empirical_ntk,
    kronecker_ntk,
    ntk_layer_shares,
    sampled_ntk,
)
from lightning_graphon.ntk.generalisation.bound import (
    GeneralisationBound,
    generalisation_bound,
    kernel_ridge_regression,
    one_vs_rest_targets,
)
from lightning_graphon.ntk.generalisation.design import DesignedGraphons, design_graphons
from lightning_graphon.ntk.infinite.finite_width import ExpectedError, expected_error
from lightning_graphon.ntk.infinite.from_model import graphon_ntk_from_model
from lightning_graphon.ntk.infinite.graphon_ntk import graphon_ntk
from lightning_graphon.ntk.operators.kernel_file import kernel_to_file
from lightning_graphon.ntk.operators.operator import DenseOperator, KernelOperator, KroneckerKernel, top_eigenpairs
from lightning_graphon.ntk.operators.spectrum import SpectralSummary, kernel_target_alignment, spectral_summary
from lightning_graphon.ntk.operators.tiling import TileShard, world_tile_shard

__all__ = [
    "DenseOperator",
    "DesignedGraphons",
    "DualActivation",
    "EmpiricalNTK",
    "ExpectedError",
    "GeneralisationBound",
    "HermiteDual",
    "KernelOperator",
    "KroneckerKernel",
    "LayerShare",
    "PiecewiseLinear",
    "ReLULike",
    "SpectralSummary",
    "TileShard",
    "design_graphons",
    "dual_activation",
    "empirical_nngp",
    "empirical_ntk",
    "expected_error",
    "generalisation_bound",
    "graphon_ntk",
    "graphon_ntk_from_model",
    "kernel_ridge_regression",
    "kernel_target_alignment",
    "kernel_to_file",
    "kronecker_ntk",
    "ntk_layer_shares",
    "one_vs_rest_targets",
    "register_activation",
    "sampled_ntk",
    "spectral_summary",
    "top_eigenpairs",
    "unregister_activation",
    "world_tile_shard",
]
