"""The kernel of a network, node by node, tile by tile over pairs of samples.

Walking back from the output tells at which pairs of positions each node is needed. A first walk over single samples
gives each sample's own moments, which the second, over pairs of samples, reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_graphon._shared.choices import Get
from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Pairs
from lightning_graphon.ntk.operators.tiling import TileShard, tiles

_CACHE = {"cpu": 8 << 20, "cuda": 512 << 20}  # bytes per tile, on a CPU for each thread
_MOST_MEMORY = 1 << 28  # bytes, that kernels at many pairs of positions take unless they are given more
_FIELDS = 6  # temporary tensors of a node's size, beside what is kept; measured for ReLU


@dataclass(frozen=True)
class Readout:
    """Which entries of the last node are the outputs.

    Attributes:
        bins: Bin [C] of each output's unit.
        positions: Its position [C].
        node: Number of the node.
    """

    bins: Tensor
    positions: Tensor
    node: int

    def single(self, number: int) -> "Readout":
        """One of the outputs."""
        return Readout(self.bins[number : number + 1], self.positions[number : number + 1], self.node)

    def weights(self, pairs: Pairs, bins: int, mean: bool) -> Tensor:
        """Matrix [C, pairs · bins] from the kernels of the node to those of the outputs, or [1, ..] to their mean."""
        column = pairs.find(self.positions, self.positions) * bins + self.bins
        rows = torch.zeros_like(column) if mean else torch.arange(len(column))
        value = 1 / len(column) if mean else 1.0
        out = torch.zeros(1 if mean else len(column), len(pairs) * bins, dtype=torch.float64)
        return out.index_put((rows, column), torch.full(column.shape, value, dtype=torch.float64), accumulate=True)


def network_kernel(
    nodes: Sequence[Node], readout: Readout, x: Tensor, x2: Tensor | None, *,
    get: Get, mean: bool, max_memory: int | None, shard: TileShard,
) -> Tensor:  # fmt: skip
    """Kernels [C, N, M] of the outputs, or their mean [1, N, M].

    Args:
        nodes: In order.
        readout: The outputs.
        x: Samples [N, d], flattened.
        x2: Other samples [M, d].
        get: "ntk" or "nngp".
        mean: Whether to average over outputs.
        max_memory: Bytes for temporary tensors.
        shard: This process's part of the tiles.
    """
    _draw(nodes, x if x2 is None else torch.cat([x, x2]), max_memory)
    last = nodes[readout.node]
    needed = needed_pairs(nodes, {readout.node: Pairs.diagonal(readout.positions.unique(), last.step.positions)})
    pairs = needed[readout.node]
    assert pairs is not None  # noqa: S101
    weights = readout.weights(pairs, last.bins, mean).to(x)

    def read(fields: dict[int, Field]) -> Tensor:
        kernel = fields[readout.node].k if get == "nngp" else fields[readout.node].t
        if kernel is None:  # nothing is trained
            kernel = torch.zeros_like(fields[readout.node].k)
        return torch.einsum("cr,rij->cij", weights, kernel.flatten(0, 1))

    return _tiled(nodes, needed, x, x2, get, max_memory, shard, len(weights), read)


def _draw(nodes: Sequence[Node], x: Tensor, max_memory: int | None) -> None:
    """Give nodes that ask for them the kernels of their inputs between all samples."""
    place = {id(node): number for number, node in enumerate(nodes)}
    for node in nodes:
        kernels = []
        for number, pairs in node.drawn_inputs.items():
            source = place[id(node.inputs[number])]
            needed = needed_pairs(nodes, {source: pairs})
            read = partial(_second_moments, source)
            count = len(pairs) * node.inputs[number].bins
            kernel = _tiled(nodes, needed, x, None, "nngp", max_memory, TileShard(), count, read, mirror=pairs)
            kernels.append(kernel.unflatten(0, (len(pairs), -1)))
        node.draw(kernels)


def _second_moments(number: int, fields: dict[int, Field]) -> Tensor:
    return fields[number].k.flatten(0, 1)


def _tiled(
    nodes: Sequence[Node], needed: "Needed", x: Tensor, x2: Tensor | None, get: Get, max_memory: int | None,
    shard: TileShard, count: int, read: Callable[[dict[int, Field]], Tensor], mirror: Pairs | None = None,
) -> Tensor:  # fmt: skip
    """What is read [count, N, M] of the fields of every tile.

    With `mirror` the rows are those of pairs of positions, which change places where the samples do.
    """
    per_pair = _bytes_per_pair(nodes, needed, x, get)
    budget = max_memory or default_memory(x.device.type, per_pair)
    left = all_moments(nodes, needed, x, 0, budget)
    right = left if x2 is None else all_moments(nodes, needed, x2, len(x), budget)
    y, offset = (x, 0) if x2 is None else (x2, len(x))
    edge = max(1, int((budget / per_pair) ** 0.5))
    edge = shard.edge(min(edge, max(len(x), len(y))), max(len(x), len(y)))
    out = x.new_zeros(count, len(x), len(y))
    for rows, cols in shard.mine(tiles(len(x), len(y), edge, symmetric=x2 is None)):
        samples = Samples(x[rows], y[cols], rows, _shifted(cols, offset), tangent=get == "ntk")
        block = read(forward(nodes, needed, samples, left, right, (rows, cols)))
        out[:, rows, cols] = block
        if x2 is None and rows == cols and mirror is None:
            out[:, rows, cols] = 0.5 * (block + block.mT)
        elif x2 is None and rows != cols:
            out[:, cols, rows] = (block if mirror is None else _exchanged(block, mirror)).mT
    return shard.collect(out)


def _exchanged(block: Tensor, pairs: Pairs) -> Tensor:
    """Rows of pairs (p, p') in the places of (p', p)."""
    order = pairs.find(pairs.second, pairs.first)
    return block.unflatten(0, (len(pairs), -1))[order].flatten(0, 1)


def _shifted(part: slice, offset: int) -> slice:
    return slice(part.start + offset, part.stop + offset)


def default_memory(device: str, per_pair: int) -> int:
    """Bytes for temporary tensors where no limit is given: what fits the cache, or a tile of 8 by 8 samples."""
    cache = _CACHE.get(device, 64 << 20) * (torch.get_num_threads() if device == "cpu" else 1)
    return max(cache, min(64 * per_pair, _MOST_MEMORY))


Needed = Sequence[Pairs | None]


def needed_pairs(nodes: Sequence[Node], requests: dict[int, Pairs], closed: bool = False) -> list[Pairs | None]:
    """Pairs at which each node is needed for the requests; None where it is not.

    Args:
        nodes: In order.
        requests: Pairs by the number of the node.
        closed: Whether where second moments are used (p, p) is needed with every (p, p').
    """
    place = {id(node): number for number, node in enumerate(nodes)}
    needed: list[Pairs | None] = [requests.get(number) for number in range(len(nodes))]
    for number in range(len(nodes) - 1, -1, -1):
        pairs = needed[number]
        if pairs is None:
            continue
        for i, source in enumerate(nodes[number].inputs):
            request = nodes[number].reads(i, pairs)
            if closed and nodes[number].uses_squares:
                request = request | Pairs.diagonal(nodes[number].own_places(i, request), request.positions)
            before = needed[place[id(source)]]
            needed[place[id(source)]] = request if before is None else before | request
    return needed


# ---- single samples


def all_moments(nodes: Sequence[Node], needed: Needed, x: Tensor, offset: int, budget: int) -> list[Moments]:
    """Moments of each sample at each node, of what nodes ask for, a few samples at a time; `offset` is their first."""
    own = _own_pairs(nodes, needed)
    per_sample = _bytes_per_pair(nodes, own, x, "nngp")
    chunk = max(1, int(budget / max(1, per_sample)))
    starts = range(0, max(1, len(x)), chunk)
    parts = [_moments(nodes, own, x[start : start + chunk], offset + start) for start in starts]
    return [_concatenate([part[number] for part in parts]) for number in range(len(nodes))]


def _own_pairs(nodes: Sequence[Node], needed: Needed) -> list[Pairs | None]:
    place = {id(node): number for number, node in enumerate(nodes)}
    requests: dict[int, Pairs] = {}
    means = any(node.uses_means for node in nodes)
    for number, node in enumerate(nodes):
        pairs = needed[number]
        for i, source in enumerate(node.inputs):
            if pairs is not None and (node.uses_squares or (means and not source.certain)):
                read = node.reads(i, pairs)
                own = Pairs.diagonal(node.own_places(i, read), read.positions)
                before = requests.get(place[id(source)])
                requests[place[id(source)]] = own if before is None else before | own
    return needed_pairs(nodes, requests, closed=True)


def _moments(nodes: Sequence[Node], own: Needed, x: Tensor, start: int) -> list[Moments]:
    part = slice(start, start + len(x))
    samples = Samples(x, x, part, part, paired=True, tangent=False)
    found: list[Moments] = []
    forward(nodes, own, samples, found, found, None)
    return found


def _concatenate(parts: list[Moments]) -> Moments:
    means, squares = [p.mean for p in parts], [p.square for p in parts]
    return Moments(*(None if t[0] is None else torch.cat(t, -1) for t in (means, squares)))  # type: ignore[arg-type]


def _own_moments(
    node: Node, k: Tensor | None, pairs: Pairs | None, before: list[Moments], x: Tensor, means: bool
) -> Moments:
    square = None
    if k is not None and pairs is not None:
        places = pairs.places
        row = pairs.find(places, places)
        inside = (pairs.codes[row] == places * pairs.positions + places).nonzero()[:, 0]
        square = k.new_zeros(pairs.positions, k.shape[1], k.shape[2])
        square[places[inside]] = k[row[inside], :, :, 0]
    usable = means and not node.centred and (square is not None or node.certain)
    return Moments(node.mean(before, x) if usable else None, square)


# ---- both


def forward(
    nodes: Sequence[Node], needed: Needed, samples: Samples, left: list[Moments], right: list[Moments],
    tile: tuple[slice, slice] | None, keep: bool = False,
) -> dict[int, Field]:  # fmt: skip
    """Fields of the nodes that nobody reads any more, or with `keep` of all.

    Without a tile the moments are found and added to `left`.
    """
    place = {id(node): number for number, node in enumerate(nodes)}
    means = any(node.uses_means for node in nodes)
    readers = [int(keep)] * len(nodes)
    for number, node in enumerate(nodes):
        for source in node.inputs if needed[number] is not None else ():
            readers[place[id(source)]] += 1
    fields: dict[int, Field] = {}
    for number, node in enumerate(nodes):
        pairs, sources = needed[number], [place[id(source)] for source in node.inputs]
        k = t = None
        if pairs is not None:
            k, t = node.propagate(input_fields(node, [fields[i] for i in sources], pairs), pairs, samples)
            for i in sources:
                readers[i] -= 1
                if not readers[i]:
                    del fields[i]
        if tile is None:
            left.append(_own_moments(node, k, pairs, [left[i] for i in sources], samples.left, means))
            ends = left[number], left[number]
        else:
            ends = left[number].select(tile[0]), right[number].select(tile[1])
        if k is not None and pairs is not None:
            fields[number] = Field(pairs, k, t, *ends, paired=samples.paired)
    return fields


def input_fields(node: Node, fields: list[Field], pairs: Pairs) -> list[Field]:
    """Fields at the node's own pairs, where it reads the same positions; other readers may need more of them."""
    same = [places is None for places in node.places]
    return [field.at(pairs) if own else field for field, own in zip(fields, same, strict=True)]


def _bytes_per_pair(nodes: Sequence[Node], needed: Needed, x: Tensor, get: Get) -> int:
    """Bytes that a walk holds at its widest place for one pair of samples."""
    place = {id(node): number for number, node in enumerate(nodes)}
    last = {place[id(source)]: n for n, node in enumerate(nodes) if needed[n] is not None for source in node.inputs}
    size = [0 if pairs is None else len(pairs) * node.bins for node, pairs in zip(nodes, needed, strict=True)]
    widest = 0
    for number in range(len(nodes)):
        held = sum(size[i] for i in range(number) if last.get(i, -1) >= number)
        widest = max(widest, (2 if get == "ntk" else 1) * (held + size[number]) + _FIELDS * size[number])
    return max(1, widest) * x.element_size()
