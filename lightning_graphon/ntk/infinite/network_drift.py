r"""The kernel of a network whose kept weights have means: forward as ever, then backward for each pair of samples.

A mean couples the tangents of different units, so the tangent kernel does not go forward alone. Of the back-propagated
signal δ of each unit the mean and the covariance go backward. The tangent kernel's recursion is linear, and its
transpose takes E[δδ'] of a node's units to that of its inputs' units; with Γ = n E[δδ'] of a bin of n units,

.. math:: Θ = \sum_{nodes} \sum_{u, p, p'} Γ(u; p, p')\, T(u; p, p'),

T the part of the node's own parameters in the tangent kernel. Signals and gradients are assumed independent given the
positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.nodes.drift_affine import DriftAffineNode
from lightning_graphon.ntk.infinite.nodes.heads import every_pair
from lightning_graphon.ntk.infinite.pairs import Pairs
from lightning_graphon.ntk.infinite.walk import (
    Readout,
    all_moments,
    default_memory,
    forward,
    input_fields,
    needed_pairs,
)
from lightning_graphon.ntk.operators.tiling import TileShard, tiles

_FIELDS = 10  # temporary tensors of the largest node's size


@dataclass(frozen=True)
class _Signals:
    """Means of back-propagated signals, summed over the units of each bin.

    Attributes:
        nodes: Means [O, P, K, N] of O outputs at each node; None where they do not get.
        edges: For each node what goes back to each of its inputs.
    """

    nodes: list[Tensor | None]
    edges: list[list[Tensor | None]]

    def select(self, samples: slice) -> "_Signals":
        """Those of some samples."""
        cut = lambda t: None if t is None else t[..., samples]  # noqa: E731
        return _Signals([cut(t) for t in self.nodes], [[cut(t) for t in edge] for edge in self.edges])


def drift_network_kernel(
    nodes: Sequence[Node], readout: Readout, x: Tensor, x2: Tensor | None, *,
    mean: bool, max_memory: int | None, shard: TileShard,
) -> Tensor:  # fmt: skip
    """Tangent kernels [C, N, M] of the outputs, or their mean [1, N, M]; arguments as of `network_kernel`."""
    places = readout.positions.unique()
    needed = needed_pairs(nodes, {readout.node: Pairs.diagonal(places, nodes[readout.node].step.positions)})
    # Means of signals at different positions do not cancel: all pairs of the positions that are read.
    needed = [None if pairs is None else every_pair(pairs.places, pairs.positions) for pairs in needed]
    y = x if x2 is None else x2
    outputs = [readout] if mean else [readout.single(o) for o in range(len(readout.bins))]
    sizes = [len(pairs) * node.bins for pairs, node in zip(needed, nodes, strict=True) if pairs is not None]
    per_pair = x.element_size() * (2 * sum(sizes) + _FIELDS * max(sizes))
    budget = max_memory or default_memory(x.device.type, per_pair)
    left = all_moments(nodes, needed, x, 0, budget)
    right = left if x2 is None else all_moments(nodes, needed, x2, len(x), budget)
    edge = max(1, int((budget / per_pair) ** 0.5))
    edge = shard.edge(min(edge, max(len(x), len(y))), max(len(x), len(y)))
    signals = [(_mean_signals(nodes, o, left, x), _mean_signals(nodes, o, right, y)) for o in outputs]
    out = x.new_zeros(len(outputs), len(x), len(y))
    for rows, cols in shard.mine(tiles(len(x), len(y), edge, symmetric=x2 is None)):
        samples = Samples(x[rows], y[cols], rows, cols)
        fields = forward(nodes, needed, replace(samples, tangent=False), left, right, (rows, cols), keep=True)
        for number, (a, b) in enumerate(signals):
            block = _backward(nodes, fields, a.select(rows), b.select(cols), samples) / (
                len(readout.bins) if mean else 1
            )
            diagonal = x2 is None and rows == cols
            out[number, rows, cols] = 0.5 * (block + block.mT) if diagonal else block
            if x2 is None and not diagonal:
                out[number, cols, rows] = block.mT
    return shard.collect(out)


def _mean_signals(nodes: Sequence[Node], readout: Readout, moments: Sequence[Moments], x: Tensor) -> _Signals:
    """Backward through the means: each node's derivative of its means by those of its inputs, at fixed variances."""
    place = {id(node): number for number, node in enumerate(nodes)}
    found: list[Tensor | None] = [None] * len(nodes)
    edges: list[list[Tensor | None]] = [[None] * len(node.inputs) for node in nodes]
    last, count = nodes[readout.node], len(readout.bins)
    first = x.new_zeros(count, last.step.positions, last.bins, len(x))
    first[torch.arange(count), readout.positions, readout.bins] = 1.0
    found[readout.node] = first
    for number in range(readout.node, -1, -1):
        signal, node = found[number], nodes[number]
        sources = [place[id(source)] for source in node.inputs]
        if signal is None or node.certain or not sources:
            continue
        edges[number] = _mean_gradients(node, [moments[i] for i in sources], signal, x)
        for i, part in zip(sources, edges[number], strict=True):
            if part is not None:
                before = found[i]
                found[i] = part if before is None else before + part
    return _Signals(found, edges)


def _mean_gradients(node: Node, moments: Sequence[Moments], signal: Tensor, x: Tensor) -> list[Tensor | None]:
    leaves, inputs = [], []
    for source, own in zip(node.inputs, moments, strict=True):
        mean = x.new_zeros(source.step.positions, source.bins, len(x)) if own.mean is None else own.mean
        leaves.append(mean.detach().clone().requires_grad_())
        square = None if own.square is None else own.square - mean.square() + leaves[-1].square()
        inputs.append(Moments(leaves[-1], square))
    with torch.enable_grad():
        out = node.mean(inputs, x)
    if out is None or not out.requires_grad:
        return [None] * len(leaves)
    rows = [torch.autograd.grad(out, leaves, s, retain_graph=True, allow_unused=True) for s in signal]
    parts = zip(*rows, strict=True)
    return [
        None if part[0] is None or source.certain else torch.stack(part)
        for part, source in zip(parts, node.inputs, strict=True)
    ]


def _backward(
    nodes: Sequence[Node], fields: dict[int, Field], left: _Signals, right: _Signals, samples: Samples
) -> Tensor:
    """Kernel [n, m] of one tile, summed over outputs."""
    place = {id(node): number for number, node in enumerate(nodes)}
    covariances: dict[int, Tensor] = {}
    total = samples.left.new_zeros(len(samples.left), len(samples.right))
    for number in range(len(nodes) - 1, -1, -1):
        node, field = nodes[number], fields.get(number)
        if field is None or node.certain:
            continue
        means = _products(node, field.pairs, left.nodes[number], right.nodes[number], samples)
        covariance = covariances.pop(number, None)
        gamma = _sum(covariance, means)
        if gamma is None:
            continue
        sources = [place[id(source)] for source in node.inputs]
        mixes = node.random_slope or isinstance(node, DriftAffineNode)
        # Where derivatives are numbers, the covariance goes back alone, and the means by themselves.
        own, back = _transpose(node, [fields[i] for i in sources], field.pairs, gamma if mixes else covariance, samples)
        total = total + (gamma * own).sum((0, 1))
        for edge, part in back.items():
            i = sources[edge]
            away = None
            if isinstance(node, DriftAffineNode):
                away = _transposed_squares(node, fields[i], field.pairs, means)
            elif mixes:
                ends = left.edges[number][edge], right.edges[number][edge]
                away = _products(nodes[i], fields[i].pairs, *ends, samples)
            part = part if away is None else part - away
            covariances[i] = part if i not in covariances else covariances[i] + part
    return total


def _products(node: Node, pairs: Pairs, left: Tensor | None, right: Tensor | None, samples: Samples) -> Tensor | None:
    """Σ over outputs and units of products of mean signals [R, K, n, m]."""
    if left is None or right is None:
        return None
    units = torch.bincount(node.bin_of_unit).to(left)[:, None, None]
    a, b = left[:, pairs.first], right[:, pairs.second]
    return torch.einsum("orkn,orkm->rknm", a, b) / units


def _transpose(
    node: Node, inputs: Sequence[Field], pairs: Pairs, gamma: Tensor | None, samples: Samples
) -> tuple[Tensor | float, dict[int, Tensor]]:
    """The node's own part of the tangent kernel, and gamma through the transpose of its recursion to each input."""
    leaves = {
        i: torch.zeros_like(field.k).requires_grad_() for i, field in enumerate(inputs) if not node.inputs[i].certain
    }
    with torch.enable_grad():
        opened = [replace(field, t=leaves.get(i)) for i, field in enumerate(inputs)]
        t = node.propagate(input_fields(node, opened, pairs), pairs, samples)[1]
    if t is None:
        return 0.0, {}
    if not t.requires_grad or gamma is None:
        return t.detach(), {}
    grads = torch.autograd.grad(t, list(leaves.values()), gamma, allow_unused=True)
    return t.detach(), {i: grad for i, grad in zip(leaves, grads, strict=True) if grad is not None}


def _transposed_squares(node: DriftAffineNode, before: Field, pairs: Pairs, means: Tensor | None) -> Tensor | None:
    if means is None:
        return None
    leaf = torch.zeros_like(before.k).requires_grad_()
    with torch.enable_grad():
        out = node.of_mean_products(leaf, before.pairs, pairs)
    return torch.autograd.grad(out, leaf, means)[0]


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right
