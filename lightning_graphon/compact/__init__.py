"""Physically smaller networks: what masks leave without effect is removed. Needs torch and scipy only."""

from lightning_graphon.compact.network import CompactNetwork, compact
from lightning_graphon.compact.report import Change, CompactReport, LayerReport
from lightning_graphon.compact.sparse import CSRLinear, LayerChoice, SparseNetwork, to_sparse

__all__ = [
    "CSRLinear",
    "Change",
    "CompactNetwork",
    "CompactReport",
    "LayerChoice",
    "LayerReport",
    "SparseNetwork",
    "compact",
    "to_sparse",
]
