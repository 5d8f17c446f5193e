"""Physically smaller networks: what masks leave without effect is removed. Needs torch and scipy only."""

from lightning_graphon.compact.network import CompactNetwork, compact
from lightning_graphon.compact.report import CompactReport, LayerReport

__all__ = ["CompactNetwork", "CompactReport", "LayerReport", "compact"]
