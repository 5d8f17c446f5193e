"""SynFlow: iterative synaptic flow (Tanaka, Kunin, Yamins, Ganguli, NeurIPS 2020, arXiv:2006.05467, eq. 3)."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_graphon.pruning.scoring.networks.substituted import linearised
from lightning_graphon.pruning.scoring.registry import ScoringContext, register_method

# The flow grows or falls like (width · mean |w|)^depth and leaves even float64 at depth 200. It is homogeneous of
# degree one in inputs and biases together, so a scale on both, and on the gradient, changes no ranking: flows from
# about 10^-560 to 10^560 have finite scores with the last of these.
_SMALL = 2.0**-480
_DOWN, _UP = (_SMALL, 2.0**-930), (1 / _SMALL, 2.0**930)


@register_method("synflow", steps=100, zeroed=False)
def synflow(context: ScoringContext, *, biases: bool = True, double: bool = True) -> dict[str, Tensor]:
    """|w · ∂R/∂w| with R = 1ᵀ f_{|θ|}(1): every parameter and buffer replaced by its absolute value.

    Evaluated in eval mode: one sample of ones has no batch statistics.

    Args:
        context: Weights to score; of the batches only the shape of the first is used.
        biases: Biases add |b| to the flow, as in the reference implementation; without them the sum of
            scores is the same in every layer and no layer collapses before the others.
        double: Score in float64, whatever the precision of the model: finite at any depth, and the same masks on
            every machine (in float32 near ties are decided by rounding, and later rounds amplify it). False scores in
            the model's own precision, for models whose size insists on it; those that do not run in float64 are
            scored so with a warning.
    """
    return flow_saliency(context, "synflow", biases=biases, double=double)


def flow_saliency(
    context: ScoringContext, method: str, *, biases: bool, double: bool, square: bool = False
) -> dict[str, Tensor]:
    """t · ∂R/∂t with R = 1ᵀ f_t(1), t = |θ| or θ²: see `synflow`.

    Args:
        context: Weights to score.
        method: Name for messages.
        biases: Whether biases add to the flow.
        double: Score in float64.
        square: t = θ², not |θ|.
    """
    batch = context.batches[0] if len(context.batches) else None
    dtype = torch.float64 if double else None
    try:
        scores, flow = _flow_scores(context, batch, dtype, 1.0, biases, square)
    except (RuntimeError, TypeError) as error:
        # The model mixes in tensors of its own that are no buffers, or the device has no float64.
        if not double:
            raise
        warnings.warn(f"{method} scores in the model's own precision, since it fails in float64: {error}", stacklevel=3)
        return flow_saliency(context, method, biases=biases, double=False, square=square)
    # Outputs may be negative, or nothing, where scores are well: log-probabilities, a last layer of zeros.
    if double and not (_SMALL < abs(flow.total) < 1 / _SMALL or _in_range(scores)):
        for scale in _UP if _all_finite(scores) else _DOWN:
            trial, other = _flow_scores(context, batch, dtype, scale, biases, square)
            if _all_finite(trial):
                scores, flow = trial, other
            if _in_range(scores):
                break
    if not double and not _all_finite(scores):
        raise ValueError(
            f"{method}: the flow leaves the range of {next(iter(scores.values())).dtype}, as in deep networks it does: "
            "score in float64 (options={'double': True}, the default), or with layers that normalise"
        )
    # Zeros in later rounds say that the network fell apart, which `prune` tells.
    dense = all(bool(mask.all()) for mask in context.masks.values())
    again = partial(_flow_scores, context, batch, dtype, biases=biases, square=square)
    if dense and _is_rounding(scores, flow, lambda scale: again(scale=scale)[0]):
        kinds = sorted({type(m).__name__ for m in context.model.modules() if isinstance(m, _SATURATING)})
        saturated = f", or activations saturate at such large inputs ({', '.join(kinds)})" if kinds else ""
        raise ValueError(
            f"{method}: every score is zero to rounding, in all selected layers ({', '.join(list(scores)[:5])}): "
            "nothing flows from the inputs to the outputs, because a layer is all zero (a head initialised so), the "
            f"batch is empty, the outputs have a constant sum (a softmax){saturated}"
        )
    return {name: context.average(scores.pop(name)) for name in context.weights}


_SATURATING = (nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid)


def _name(square: bool) -> str:
    return "synflow-l2" if square else "synflow"


class _Flow(NamedTuple):
    """Sums of the outputs and of their absolute values; what both, and each gradient, were scaled by."""

    total: float
    magnitude: float
    scale: float


def _flow_scores(
    context: ScoringContext, batch: Any, dtype: torch.dtype | None, scale: float, biases: bool, square: bool
) -> tuple[dict[str, Tensor], _Flow]:
    """Scores with inputs, biases and gradient scaled, and the flow.

    A weight's gradient is complete when all of its uses have had their backward pass: its |θ| (or θ²) is then replaced
    by its score, so that there are never all of both.
    """
    scores: dict[str, Tensor] = {}

    def score(name: str, grad: Tensor) -> None:
        weight = linear.weights[name]
        absolute, weight.data = weight.data, weight.new_zeros(()).expand_as(weight)
        # Not in the memory of |θ|: a use that sends no gradient, of a detached weight, may still be to come.
        scores[name] = (absolute * grad).abs_()

    with linearised(context, dtype, scale, biases, square) as linear:
        outputs = context.objective.outputs_of_ones(batch, scale)
        flow = outputs.sum()
        if not flow.requires_grad:
            raise ValueError(f"{_name(square)}: the outputs do not depend on the weights to prune")
        # The gradient is scaled as well: products of large activations and large gradients stay finite.
        linear.stream_gradients(flow * scale, score)
    unused = {name: torch.zeros_like(weight) for name, weight in context.weights.items() if name not in scores}
    return scores | unused, _Flow(float(flow.detach()), float(outputs.detach().abs().sum()), scale)


def _is_rounding(scores: Mapping[str, Tensor], flow: _Flow, again: Callable[[float], Mapping[str, Tensor]]) -> bool:
    """Whether the scores are what rounding leaves of a flow that does not depend on the weights.

    Where it does, the scores of a layer sum to about the outputs, exactly so without biases for ReLU. Where their sum
    is nothing beside the outputs, inputs that are larger by a thousandth tell: scores follow them, and rounding, which
    is another one on each processor, is drawn anew. It is a few last digits, which may be the same twice.
    """
    total = _sum(scores.values())
    eps = torch.finfo(next(iter(scores.values())).dtype).eps
    if not total <= eps**0.5 * flow.scale * flow.magnitude < math.inf:
        return False
    if total == 0:
        return True
    others = (again(flow.scale * (1 + i * 2.0**-10)) for i in range(1, 17))
    return any(_sum((scores[name] - other[name]).abs() for name in scores) > 0.25 * total for other in others)


def _sum(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.sum(dtype=torch.float64)) for tensor in tensors)


def _in_range(scores: Mapping[str, Tensor]) -> bool:
    """Whether nothing overflowed, and what counts did not underflow."""
    return _all_finite(scores) and max(float(score.max()) for score in scores.values()) > _SMALL


def _all_finite(scores: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(score.sum())) for score in scores.values())
