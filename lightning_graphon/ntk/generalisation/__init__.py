"""Generalisation bounds and predictions of a kernel, and graphons designed for their kernel."""

from lightning_graphon.ntk.generalisation.bound import (
    GeneralisationBound,
    generalisation_bound,
    kernel_ridge_regression,
    one_vs_rest_targets,
)
from lightning_graphon.ntk.generalisation.design import DesignedGraphons, design_graphons

__all__ = [
    "DesignedGraphons",
    "GeneralisationBound",
    "design_graphons",
    "generalisation_bound",
    "kernel_ridge_regression",
    "one_vs_rest_targets",
]
