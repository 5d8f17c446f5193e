"""Kernels as matrices, Kronecker products and operators, and their spectra."""

from lightning_graphon.ntk.operators.operator import DenseOperator, KernelOperator, KroneckerKernel, top_eigenpairs
from lightning_graphon.ntk.operators.spectrum import SpectralSummary, kernel_target_alignment, spectral_summary
from lightning_graphon.ntk.operators.tiling import TileShard, world_tile_shard

__all__ = [
    "DenseOperator",
    "KernelOperator",
    "KroneckerKernel",
    "SpectralSummary",
    "TileShard",
    "kernel_target_alignment",
    "spectral_summary",
    "top_eigenpairs",
    "world_tile_shard",
]
