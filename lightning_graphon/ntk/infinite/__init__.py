"""Kernels of infinitely wide networks whose masks follow graphons."""

from lightning_graphon.ntk.infinite.from_model import graphon_ntk_from_model
from lightning_graphon.ntk.infinite.graphon_ntk import graphon_ntk

__all__ = ["graphon_ntk", "graphon_ntk_from_model"]
