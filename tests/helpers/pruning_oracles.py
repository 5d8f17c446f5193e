"""Slow and obvious references for the tests of `lightning_graphon.pruning`."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_graphon.pruning import LayerCollapseWarning, prune
from lightning_graphon.pruning.scoring.registry import get_method


def scores_of(method: str, model: nn.Module, options: Mapping[str, Any] | None = None, **arguments: Any) -> dict:
    """The scores that `prune` sees from a method in its first round; the remaining arguments are those of `prune`."""
    seen: dict[str, Tensor] = {}

    def spy(problem: Any) -> dict[str, Tensor]:
        scores = get_method(method).score(problem, **(options or {}))
        for name, score in scores.items():
            seen.setdefault(name, score.detach().clone())
        return scores

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)
        prune(model, spy, **{"sparsity": 0.5, **arguments})
    return seen


def keep_largest_by_sorting(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Sort (score, position) pairs in Python and keep the first `keep`."""
    entries = [
        (-value, position)
        for position, value in enumerate(v for score in scores.values() for v in score.flatten().tolist())
    ]
    kept = {position for _, position in sorted(entries)[:keep]}
    masks, at = {}, 0
    for name, score in scores.items():
        flags = [position in kept for position in range(at, at + score.numel())]
        masks[name] = torch.tensor(flags, dtype=torch.bool).reshape(score.shape)
        at += score.numel()
    return masks


def synflow_log_scores(layers: Sequence[nn.Linear]) -> list[np.ndarray]:
    """log of SynFlow's scores for Linear (ReLU) chains, by sums of exponentials: no overflow at any depth.

    On an input of ones everything is positive, so ReLU is the identity: the score of w_ij is
    (flow into j) · |w_ij| · (flow out of i).
    """
    with np.errstate(divide="ignore"):  # log 0 = -inf is what an absent bias or weight means
        weights = [np.log(np.abs(layer.weight.detach().double().numpy())) for layer in layers]
        biases = [
            np.log(np.abs(layer.bias.detach().double().numpy()))
            if layer.bias is not None
            else np.full(layer.out_features, -np.inf)
            for layer in layers
        ]
    forward = [np.zeros(layers[0].in_features)]
    for weight, bias in zip(weights, biases, strict=True):
        forward.append(np.logaddexp(np.logaddexp.reduce(weight + forward[-1][None, :], axis=1), bias))
    backward = [np.zeros(layers[-1].out_features)]
    for weight in reversed(weights[1:]):
        backward.insert(0, np.logaddexp.reduce(weight + backward[0][:, None], axis=0))
    return [b[:, None] + w + f[None, :] for b, w, f in zip(backward, weights, forward, strict=False)]


def dense_hessian_times_gradient(model: nn.Module, loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """H g over all of `weights` as one vector, the Hessian built row by row."""
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in grads])
    rows = []
    for entry in gradient:
        row = torch.autograd.grad(entry, weights, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(w) if r is None else r).reshape(-1) for r, w in zip(row, weights, strict=True)]
            )
        )
    return torch.stack(rows) @ gradient.detach()
