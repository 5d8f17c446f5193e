"""Tangent kernels: infinite width, finite width, their spectra, generalisation. Needs torch and scipy only."""

from lightning_graphon.ntk.activations import (
    DualActivation,
    HermiteDual,
    PiecewiseLinear,
    ReLULike,
    dual_activation,
    register_activation,
    unregister_activation,
)
from lightning_graphon.ntk.empirical import EmpiricalNTK, LayerShare, empirical_ntk, kronecker_ntk, ntk_layer_shares
from lightning_graphon.ntk.generalisation import (
    DesignedGraphons,
    GeneralisationBound,
    design_graphons,
    generalisation_bound,
    kernel_ridge_regression,
    one_vs_rest_targets,
)
from lightning_graphon.ntk.infinite import graphon_ntk, graphon_ntk_from_model
from lightning_graphon.ntk.operators import (
    DenseOperator,
    KernelOperator,
    KroneckerKernel,
    SpectralSummary,
    TileShard,
    kernel_target_alignment,
    spectral_summary,
    top_eigenpairs,
    world_tile_shard,
)

__all__ = [
    "DenseOperator",
    "DesignedGraphons",
    "DualActivation",
    "EmpiricalNTK",
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
    "empirical_ntk",
    "generalisation_bound",
    "graphon_ntk",
    "graphon_ntk_from_model",
    "kernel_ridge_regression",
    "kernel_target_alignment",
    "kronecker_ntk",
    "ntk_layer_shares",
    "one_vs_rest_targets",
    "register_activation",
    "spectral_summary",
    "top_eigenpairs",
    "unregister_activation",
    "world_tile_shard",
]
