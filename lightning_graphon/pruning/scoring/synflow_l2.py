"""SynFlow-L2: the synaptic flow through squared weights (Gebhart, Saxena, Schrater 2021, arXiv:2101.10552)."""

from torch import Tensor

from lightning_graphon.pruning.scoring.registry import ScoringContext, register_method
from lightning_graphon.pruning.scoring.synflow import flow_saliency


@register_method("synflow-l2", steps=100, zeroed=False)
def synflow_l2(context: ScoringContext, *, biases: bool = True, double: bool = True) -> dict[str, Tensor]:
    """θ² · ∂R/∂θ² with R = 1ᵀ f_{θ²}(1): every parameter and buffer replaced by its square, evaluated in eval mode.

    R counts paths by the squares of their weights, which is the trace of the path kernel. On a ReLU MLP the score
    divided by θ² is a product of a sum over paths from the outputs and one from the inputs: of rank one in each layer.

    Args:
        context: Weights to score; of the batches only the shape of the first is used.
        biases: Biases add b² to the flow.
        double: Score in float64; see `synflow`.
    """
    return flow_saliency(context, "synflow-l2", biases=biases, double=double, square=True)
