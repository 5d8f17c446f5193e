"""Graphons predicted from scores, before any mask is made."""

from lightning_graphon.graphon.limits.factorised_saliency import (
    FactorisedSaliency,
    fit_factorised_saliency,
    limit_distances,
    predicted_graphons,
)
from lightning_graphon.graphon.limits.scaled_saliency import ScaledSaliency

__all__ = ["FactorisedSaliency", "ScaledSaliency", "fit_factorised_saliency", "limit_distances", "predicted_graphons"]
