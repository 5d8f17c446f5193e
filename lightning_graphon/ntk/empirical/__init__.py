"""The exact tangent kernel of a finite network."""

from lightning_graphon.ntk.empirical.kernel import empirical_ntk
from lightning_graphon.ntk.empirical.kronecker import EmpiricalNTK, kronecker_ntk
from lightning_graphon.ntk.empirical.layer_shares import LayerShare, ntk_layer_shares
from lightning_graphon.ntk.empirical.nngp import empirical_nngp
from lightning_graphon.ntk.empirical.sampled import sampled_ntk

__all__ = [
    "EmpiricalNTK",
    "LayerShare",
    "empirical_nngp",
    "empirical_ntk",
    "kronecker_ntk",
    "ntk_layer_shares",
    "sampled_ntk",
]
