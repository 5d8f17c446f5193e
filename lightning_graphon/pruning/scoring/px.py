"""PX: path exclusion (Iurada, Ciccone, Tommasi, CVPR 2024, arXiv:2406.01820)."""

from typing import Any

import torch
from torch import Tensor

from lightning_graphon.pruning.scoring.networks.gates import FixedGates, RecordedGates, Ungated
from lightning_graphon.pruning.scoring.networks.substituted import counting_paths, linearised, masked
from lightning_graphon.pruning.scoring.registry import ScoringContext, register_method


@register_method("px", needs="data", steps=100, zeroed=False)
def px(context: ScoringContext) -> dict[str, Tensor]:
    """θ² · Σ_b (∂R_b/∂θ²)² with R_b = Σ z₁ z₂ over samples and outputs of a batch: an upper bound of the NTK's trace.

    z₁ counts the paths that are open on the data: weights one where kept, the ReLU gates of the network itself,
    inputs x². z₂ weighs all paths: weights θ², no ReLU, inputs of ones. Biases and buffers enter z₂ by their squares,
    and z₁ not at all. In eval mode, in float64. Other activations stay what they are in all three networks.

    Args:
        context: Weights to score; the inputs of the batches are used, not the targets.

    Raises:
        ValueError: The network is so deep that the paths leave the range of float64.
    """
    passing = torch.stack([_open_paths(context, batch) for batch in context.batches])
    # One factor for all batches and processes: no ranking changes, and squares of gradients stay in range.
    level = context.average(passing.abs().amax())
    passing = passing / torch.where(level > 0, level, 1.0)
    total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in context.weights.items()}
    with linearised(context, torch.float64, 1.0, biases=True, square=True) as linear, Ungated():
        for batch, open_paths in zip(context.batches, passing, strict=True):
            flow = context.objective.outputs_of_ones(batch).reshape(-1, open_paths.numel()).mean(0)
            for name, grad in linear.named(linear.gradients((open_paths * flow).sum())).items():
                total[name] += grad.square()
        squares = {name: weight.detach() for name, weight in linear.weights.items()}
    scores = {name: context.average(total[name] * squares[name]) for name in total}
    if not all(bool(torch.isfinite(score.sum())) for score in scores.values()):
        raise ValueError("px: sums over paths leave the range of float64: take layers that normalise, or synflow-l2")
    return scores


@torch.no_grad()
def _open_paths(context: ScoringContext, batch: Any) -> Tensor:
    """Σ_n z₁ of the samples of a batch, [outputs] float64."""
    with masked(context, torch.float64), RecordedGates() as recorded:
        context.objective.outputs(batch, lambda x: x)
    with counting_paths(context, torch.float64), FixedGates(recorded.gates):
        return context.objective.outputs(batch, torch.square).sum(0)
