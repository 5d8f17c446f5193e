"""SynFlow: iterative synaptic flow (Tanaka, Kunin, Yamins, Ganguli, NeurIPS 2020, arXiv:2006.05467, eq. 3)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon.pruning.methods import Problem, register_method

# The flow grows or falls like (width · mean |w|)^depth and leaves even float64 at depth 200. It is homogeneous of
# degree one in inputs and biases together, so a scale on both, and on the gradient, changes no ranking: flows from
# about 10^-560 to 10^560 have finite scores with the last of these.
_SMALL = 2.0**-480
_DOWN, _UP = (_SMALL, 2.0**-930), (1 / _SMALL, 2.0**930)


@register_method("synflow", steps=100)
def synflow(problem: Problem, *, biases: bool = True, double: bool = True) -> dict[str, Tensor]:
    """|w · ∂R/∂w| with R = 1ᵀ f_{|θ|}(1): every parameter and buffer replaced by its absolute value.

    Evaluated in eval mode: one sample of ones has no batch statistics.

    Args:
        problem: What to score; of the batches only the shape of the first is used.
        biases: Biases add |b| to the flow, as in the reference implementation; without them the sum of
            scores is the same in every layer and no layer collapses before the others.
        double: Score in float64, whatever the precision of the model: finite at any depth, and the same masks on
            every machine (in float32 near ties are decided by rounding, and later rounds amplify it). False scores in
            the model's own precision, for models whose size insists on it; those that do not run in float64 are
            scored so with a warning.
    """
    batch = problem.batches[0] if len(problem.batches) else None
    dtype = torch.float64 if double else None
    try:
        scores, flow = _flow_scores(problem, batch, dtype, 1.0, biases)
    except (
        RuntimeError,
        TypeError,
    ) as error:  # tensors of the model's own that are no buffers; devices without float64
        if not double:
            raise
        warnings.warn(f"synflow scores in the model's own precision, since it fails in float64: {error}", stacklevel=2)
        return synflow(problem, biases=biases, double=False)
    if double and not _SMALL < flow < 1 / _SMALL:
        for scale in _UP if _all_finite(scores) else _DOWN:
            trial, _ = _flow_scores(problem, batch, dtype, scale, biases)
            scores = trial if _all_finite(trial) else scores
            if _in_range(scores):
                break
    return problem.named([problem.average(score) for score in scores])


def _flow_scores(
    problem: Problem, batch: Any, dtype: torch.dtype | None, scale: float, biases: bool
) -> tuple[list[Tensor], float]:
    """Scores with inputs, biases and gradient scaled, and the flow."""
    with _linearised(problem.model, dtype, scale, biases):
        flow = problem.objective.flow(batch, scale)
        if not flow.requires_grad:
            raise ValueError("synflow: the outputs do not depend on the weights to prune")
        # The gradient is scaled as well: products of large activations and large gradients stay finite.
        grads = problem.gradients(flow * scale)
        scores = [g.mul_(w.detach()).abs_() for g, w in zip(grads, problem.weights.values(), strict=True)]
    return scores, float(flow.detach())


def _in_range(scores: list[Tensor]) -> bool:
    """Whether nothing overflowed, and what counts did not underflow."""
    return _all_finite(scores) and max(float(score.max()) for score in scores) > _SMALL


def _all_finite(scores: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(score.sum())) for score in scores)


@contextmanager
def _linearised(model: nn.Module, dtype: torch.dtype | None, scale: float, biases: bool) -> Iterator[None]:
    """The model with |θ|, |buffers| and eval mode, in `dtype`; biases times `scale`. Restored by the caller."""
    parameters = {p: p.data for p in model.parameters()}
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    modes = [(m, m.training) for m in model.modules()]
    additive = {p for name, p in model.named_parameters() if p.ndim == 1 and _adds(name)}
    try:
        model.eval()
        for parameter, data in parameters.items():
            factor = (scale if biases else 0.0) if parameter in additive else 1.0
            parameter.data = _absolute(data, dtype, factor)
        for module, name, buffer in buffers:
            factor = scale if name == "running_mean" else 1.0
            module._buffers[name] = _absolute(buffer, dtype, factor)
        yield
    finally:
        for parameter, data in parameters.items():
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module, training in modes:
            module.training = training


def _adds(name: str) -> bool:
    """Whether this parameter is a bias: it adds to the flow and does not multiply it."""
    return name.rpartition(".")[2].startswith(("bias", "in_proj_bias"))


def _absolute(tensor: Tensor, dtype: torch.dtype | None, factor: float) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.abs() if tensor.dtype != torch.bool else tensor
    absolute = tensor.detach().to(dtype or tensor.dtype, copy=True).abs_()
    return absolute if factor == 1.0 else absolute.mul_(factor)
