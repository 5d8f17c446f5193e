"""The exact tangent kernel of a finite network."""

from lightning_graphon.ntk.empirical.kernel import LayerShare, empirical_ntk, ntk_layer_shares
from lightning_graphon.ntk.empirical.kronecker import EmpiricalNTK, kronecker_ntk

__all__ = ["EmpiricalNTK", "LayerShare", "empirical_ntk", "kronecker_ntk", "ntk_layer_shares"]
