"""Masks to step graphons: estimation, distances, motifs. Needs torch and scipy only.

Rows (axis u) are outputs and columns (axis v) are inputs everywhere, as in a weight `[out, in]`.
"""

from lightning_graphon.graphon.core.at_density import values_at_density
from lightning_graphon.graphon.core.families import FAMILIES, as_graphon, block, constant, power_law, product
from lightning_graphon.graphon.core.step_graphon import StepGraphon, common_refinement
from lightning_graphon.graphon.distances.cut_norm import CutNorm, cut_norm
from lightning_graphon.graphon.distances.distances import (
    CutDistance,
    cut_distance,
    l1_distance,
    l2_distance,
    transport_distance,
)
from lightning_graphon.graphon.estimation.estimate import estimate_graphon
from lightning_graphon.graphon.estimation.layers import layer_graphons
from lightning_graphon.graphon.flow.layer_flow import FlowPoint, LayerFlow
from lightning_graphon.graphon.flow.positions import UnitPositions
from lightning_graphon.graphon.inputs.certificate import RectangleCertificate, rectangle_certificate
from lightning_graphon.graphon.inputs.expressivity import (
    CoveredOrder,
    active_inputs,
    common_neighbour_count,
    covered_order,
    dead_units,
    effective_inputs,
    expressivity_table,
    mean_common_neighbour_count,
)
from lightning_graphon.graphon.inputs.relevance import coordinate_relevance, input_path_density
from lightning_graphon.graphon.limits.convergence import Condition, convergence_conditions
from lightning_graphon.graphon.limits.factorised_saliency import (
    FactorisedSaliency,
    fit_factorised_saliency,
    limit_distances,
    predicted_graphons,
    score_limits,
)
from lightning_graphon.graphon.limits.scaled_saliency import ScaledSaliency
from lightning_graphon.graphon.motifs.homogeneity import HomogeneityTest, homogeneity_test
from lightning_graphon.graphon.motifs.motifs import MotifDensities, motif_densities, path_density
from lightning_graphon.graphon.spectra.weight_spectrum import WeightSpectrum, weight_spectrum

__all__ = [  # noqa: RUF022  grouped by what they are for
    # the object
    "StepGraphon",
    "common_refinement",
    # from masks
    "estimate_graphon",
    "layer_graphons",
    # designed graphons
    "FAMILIES",
    "as_graphon",
    "block",
    "constant",
    "power_law",
    "product",
    "values_at_density",
    # which inputs a mask reads
    "coordinate_relevance",
    "input_path_density",
    # predicted limits
    "Condition",
    "convergence_conditions",
    "FactorisedSaliency",
    "ScaledSaliency",
    "fit_factorised_saliency",
    "limit_distances",
    "predicted_graphons",
    "score_limits",
    # what a first layer can express
    "CoveredOrder",
    "active_inputs",
    "covered_order",
    "dead_units",
    "effective_inputs",
    "expressivity_table",
    "common_neighbour_count",
    "mean_common_neighbour_count",
    # masks that change
    "FlowPoint",
    "LayerFlow",
    "UnitPositions",
    "RectangleCertificate",
    "rectangle_certificate",
    # distances
    "CutDistance",
    "CutNorm",
    "cut_distance",
    "cut_norm",
    "l1_distance",
    "l2_distance",
    "transport_distance",
    # spectra of masked weights
    "WeightSpectrum",
    "weight_spectrum",
    # motifs and the taxonomy
    "HomogeneityTest",
    "MotifDensities",
    "homogeneity_test",
    "motif_densities",
    "path_density",
]
