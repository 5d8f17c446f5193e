"""FORCE: foresight connection sensitivity (de Jorge et al., ICLR 2021, arXiv:2006.09081)."""

from dataclasses import replace

from torch import Tensor, nn

from lightning_graphon._shared.module_state import swap_tensors
from lightning_graphon.pruning.scoring.first_order import mean_gradients
from lightning_graphon.pruning.scoring.registry import ScoringContext, register_method


@register_method("force", needs="loss", steps=60, zeroed=False, revives=True)
def force(context: ScoringContext) -> dict[str, Tensor]:
    """|θ · ∂L/∂(m ⊙ θ)| with the gradient of the network pruned so far, for pruned weights as well: they may return.

    So the last mask is chosen among all weights by what each would add to the sparse network, and not among those that
    earlier rounds have left. One round is SNIP.

    Args:
        context: Weights to score.
    """
    pruned = {name: nn.Parameter(w.detach() * context.masks[name]) for name, w in context.weights.items()}
    with swap_tensors(context.model, {w: pruned[name] for name, w in context.weights.items()}):
        gradients = mean_gradients(replace(context, weights=pruned))
    return {name: gradients[name].mul_(w.detach()).abs_() for name, w in context.weights.items()}
