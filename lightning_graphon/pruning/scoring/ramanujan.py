"""Ramanujan masks: random regular bipartite graphs, which are expanders (Hoang et al., ICLR 2023, measure masks so).

A bipartite graph with degrees d on one side and e on the other is Ramanujan if its second singular value is at most
√(d − 1) + √(e − 1), the least that large graphs can have. Random regular ones come as near to it as one likes (Brito,
Dumitriu, Harris 2022).
"""

import math
import warnings

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import svds
from torch import Tensor

from lightning_graphon._shared.random import ShuffledPasses, generator
from lightning_graphon._shared.weight_layout import layout_of
from lightning_graphon.pruning.scoring.registry import ScoringContext, register_method

_SWAPS = 100  # tries to give every row another column than it has
_TRIES = 5
_DENSE = 256  # a side up to which all singular values cost little


@register_method("ramanujan", needs="nothing", zeroed=False)
def ramanujan(context: ScoringContext, *, tolerance: float = 0.1) -> dict[str, Tensor]:
    """Scores that fall from round to round of a deal in which every output gets one input that it has not yet.

    Inputs are dealt in turn, in a random order, so that at any threshold the degrees of the outputs of a layer differ
    by one at most, and those of the inputs too. Scores are shares of the layer's weights: every layer has the same
    density unless the allocation says otherwise. Above density ½ the further weights are random.

    Args:
        context: Weights to score; only shapes and the seed are used. Taps of convolutions are inputs.
        tolerance: A layer whose second singular value exceeds the bound by more than this share, at the density asked
            for, is drawn again; five times, and then it is told.
    """
    return {
        name: _scores(context, name, number, tolerance).to(weight.device)
        for number, (name, weight) in enumerate(context.weights.items())
    }


def _scores(context: ScoringContext, name: str, number: int, tolerance: float) -> Tensor:
    layout = layout_of(context.model, name)
    rows = layout.rows(torch.empty(context.weights[name].shape, device="meta")).shape
    shape = (rows[0], rows[1:].numel())
    edges = round(context.density * math.prod(shape))
    draws = (
        deal(*shape, generator(context.seed, f"ramanujan graph of layer {number}, draw {n}")) for n in range(_TRIES)
    )
    best, excess = torch.empty(shape), math.inf
    for order in draws:
        beyond = spectral_excess(order < edges)
        if beyond < excess:
            best, excess = order, beyond
        if excess <= tolerance:
            break
    else:
        warnings.warn(
            f"ramanujan: the second singular value of {name!r} is {excess:.0%} above the bound of its degrees, in the "
            f"best of {_TRIES} draws",
            stacklevel=5,
        )
    # In float64, which tells all places of a layer apart.
    return layout.stored((1 - best.double() / best.numel()).reshape(rows))


def deal(outputs: int, inputs: int, source: torch.Generator) -> Tensor:
    """The order in which the entries of a mask come, int64 [out, in]: every prefix is nearly regular up to a half."""
    order = np.full((outputs, inputs), -1)
    deck, rows = ShuffledPasses(inputs, source), np.arange(outputs)
    for level in range(inputs // 2):
        cards = deck.take(outputs).numpy()
        places = torch.randperm(outputs, generator=source).numpy()  # in the deck, of each row's card
        for _ in range(_SWAPS):
            twice = np.flatnonzero(order[rows, cards[places]] >= 0)
            if not len(twice):
                break
            _swap(places, cards, twice, order, source)
        chosen = cards[places]
        for row in np.flatnonzero(order[rows, chosen] >= 0):  # too small a layer to swap in
            chosen[row] = np.flatnonzero(order[row] < 0)[0]
        order[rows, chosen] = level * outputs + places
    left = order < 0
    start = order.size - int(left.sum())
    order[left] = start + torch.randperm(order.size - start, generator=source).numpy()
    return torch.from_numpy(order)


def _swap(places: np.ndarray, cards: np.ndarray, twice: np.ndarray, order: np.ndarray, source: torch.Generator) -> None:
    """Let rows that were dealt a column twice swap cards with others, where neither has the other's column."""
    partners = torch.randperm(len(places), generator=source).numpy()[: len(twice)]
    apart = ~np.isin(partners, twice)
    mine, other = twice[apart], partners[apart]
    free = (order[mine, cards[places[other]]] < 0) & (order[other, cards[places[mine]]] < 0)
    mine, other = mine[free], other[free]
    places[mine], places[other] = places[other], places[mine]


def spectral_excess(mask: Tensor) -> float:
    """How far the second singular value of a mask is above √(d − 1) + √(e − 1), as a share; degrees d, e are means.

    Below zero for a Ramanujan graph. Minus infinity where a degree is below 3: such graphs are no expanders.

    >>> round(spectral_excess(torch.ones(8, 8)), 3)
    -1.0
    """
    edges = float(mask.double().sum())
    degrees = [edges / side for side in mask.shape]
    if min(degrees) < 3:
        return -math.inf
    bound = sum(math.sqrt(degree - 1) for degree in degrees)
    return _second_singular_value(mask.numpy().astype(np.float64)) / bound - 1


def _second_singular_value(matrix: np.ndarray) -> float:
    if min(matrix.shape) <= _DENSE:
        return float(np.linalg.svd(matrix, compute_uv=False)[1])
    wide = sparse.csr_array(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
    # ARPACK would draw its first vector from the global generator.
    first = np.random.default_rng(0).standard_normal(wide.shape[0])
    values = svds(wide, k=2, v0=first, tol=1e-3, return_singular_vectors=False)
    return float(min(values))
