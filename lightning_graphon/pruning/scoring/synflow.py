"""SynFlow: iterative synaptic flow (Tanaka, Kunin, Yamins, Ganguli, NeurIPS 2020, arXiv:2006.05467, eq. 3)."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import swap_tensors
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
    batch = context.batches[0] if len(context.batches) else None
    dtype = torch.float64 if double else None
    try:
        scores, flow = _flow_scores(context, batch, dtype, 1.0, biases)
    except (RuntimeError, TypeError) as error:
        # The model mixes in tensors of its own that are no buffers, or the device has no float64.
        if not double:
            raise
        warnings.warn(f"synflow scores in the model's own precision, since it fails in float64: {error}", stacklevel=2)
        return synflow(context, biases=biases, double=False)
    # Outputs may be negative, or nothing, where scores are well: log-probabilities, a last layer of zeros.
    if double and not (_SMALL < abs(flow.total) < 1 / _SMALL or _in_range(scores)):
        for scale in _UP if _all_finite(scores) else _DOWN:
            trial, other = _flow_scores(context, batch, dtype, scale, biases)
            if _all_finite(trial):
                scores, flow = trial, other
            if _in_range(scores):
                break
    if not double and not _all_finite(scores):
        raise ValueError(
            f"synflow: the flow leaves the range of {next(iter(scores.values())).dtype}, as in deep networks it does: "
            "score in float64 (options={'double': True}, the default), or with layers that normalise"
        )
    # Zeros in later rounds say that the network fell apart, which `prune` tells.
    dense = all(bool(mask.all()) for mask in context.masks.values())
    if dense and _is_rounding(scores, flow, lambda scale: _flow_scores(context, batch, dtype, scale, biases)[0]):
        kinds = sorted({type(m).__name__ for m in context.model.modules() if isinstance(m, _SATURATING)})
        saturated = f", or activations saturate at the large inputs of SynFlow ({', '.join(kinds)})" if kinds else ""
        raise ValueError(
            f"synflow: every score is zero to rounding, in all selected layers ({', '.join(list(scores)[:5])}): "
            "nothing flows from the inputs to the outputs, because a layer is all zero (a head initialised so), the "
            f"batch is empty, the outputs have a constant sum (a softmax){saturated}"
        )
    return {name: context.average(scores.pop(name)) for name in context.weights}


_SATURATING = (nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid)


class _Flow(NamedTuple):
    """Sums of the outputs and of their absolute values; what both, and each gradient, were scaled by."""

    total: float
    magnitude: float
    scale: float


def _flow_scores(
    context: ScoringContext, batch: Any, dtype: torch.dtype | None, scale: float, biases: bool
) -> tuple[dict[str, Tensor], _Flow]:
    """Scores with inputs, biases and gradient scaled, and the flow.

    A weight's gradient is complete when all of its uses have had their backward pass: its |θ| is then replaced by its
    score, so that there are never all of both.
    """
    scores: dict[str, Tensor] = {}

    def score(name: str, grad: Tensor) -> None:
        weight = linear.weights[name]
        absolute, weight.data = weight.data, weight.new_zeros(()).expand_as(weight)
        # Not in the memory of |θ|: a use that sends no gradient, of a detached weight, may still be to come.
        scores[name] = (absolute * grad).abs_()

    with _linearised(context, dtype, scale, biases) as linear:
        outputs = context.objective.outputs_of_ones(batch, scale)
        flow = outputs.sum()
        if not flow.requires_grad:
            raise ValueError("synflow: the outputs do not depend on the weights to prune")
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


@contextmanager
def _linearised(
    context: ScoringContext, dtype: torch.dtype | None, scale: float, biases: bool
) -> Iterator[ScoringContext]:
    """The model with |θ| of the weights kept, |buffers| and eval mode, in `dtype`; biases times `scale`.

    Yields the context of the weights that stand in the model then.
    """
    model, names = context.model, {weight: name for name, weight in context.weights.items()}
    substitutes: dict[Tensor, Tensor] = {}
    scored: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter in names:
            data = _masked_magnitude(context, names[parameter], dtype)
            substitutes[parameter] = scored[names[parameter]] = nn.Parameter(data)
        else:
            factor = (scale if biases else 0.0) if parameter.ndim == 1 and _adds(name) else 1.0
            data = _absolute(parameter, dtype, factor)
            substitutes[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers():
        substitutes[buffer] = _absolute(buffer, dtype, scale if name.endswith("running_mean") else 1.0)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with swap_tensors(model, substitutes):
            yield replace(context, weights={name: scored[name] for name in context.weights})
    finally:
        for module, training in modes.items():
            module.training = training


def _adds(name: str) -> bool:
    """Whether this parameter is a bias: it adds to the flow and does not multiply it."""
    return name.rpartition(".")[2].startswith(("bias", "in_proj_bias"))


def _masked_magnitude(context: ScoringContext, name: str, dtype: torch.dtype | None) -> Tensor:
    """|θ| of a weight, zero where it is pruned."""
    return _absolute(context.weights[name], dtype, 1.0).mul_(context.masks[name])


def _absolute(tensor: Tensor, dtype: torch.dtype | None, factor: float) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.abs() if tensor.dtype != torch.bool else tensor
    absolute = tensor.detach().to(dtype or tensor.dtype, copy=True).abs_()
    return absolute if factor == 1.0 else absolute.mul_(factor)
