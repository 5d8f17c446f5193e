"""What the two kinds of attention share: heads of queries, keys and values, and their positions."""

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field
from lightning_graphon.ntk.infinite.nodes.base import Node
from lightning_graphon.ntk.infinite.pairs import Pairs, PositionMap, Taps
from lightning_graphon.tracing.steps import Attention, Part
from lightning_graphon.tracing.tracer import refusal


def parts(node: Node) -> tuple[Part, Part, Part]:
    """Where queries, keys and values are in their inputs."""
    assert isinstance(node.step, Attention)  # noqa: S101
    return node.step.query, node.step.key, node.step.value


def head_places(node: Node) -> list[PositionMap | None]:
    """Positions that are read of each input."""
    return [
        Taps(part.positions[None], source.step.positions) for part, source in zip(parts(node), node.inputs, strict=True)
    ]


def head_reads(node: Node, number: int, pairs: Pairs) -> Pairs:
    """Queries at the same pairs, keys and values at all."""
    places, size = parts(node)[number].positions, node.inputs[number].step.positions
    if number:
        return every_pair(places, size)
    return Pairs.from_ends(places[pairs.first], places[pairs.second], size)


def head_shares(node: Node) -> tuple[Tensor, Tensor]:
    """Share [K, heads] of each head in each bin of outputs, and the bin [K] of the values that it is made of."""
    units = parts(node)[2].units
    owner = torch.arange(len(units)).repeat_interleave(units.shape[1])
    share = torch.zeros(node.bins, len(units), dtype=torch.float64)
    share.index_put_((node.bin_of_unit, owner), torch.ones(len(owner), dtype=share.dtype), accumulate=True)
    bins = torch.empty(node.bins, dtype=torch.long)
    bins[node.bin_of_unit] = node.inputs[2].bin_of_unit[units.reshape(-1)]
    return share / share.sum(1, keepdim=True), bins


def between_tokens(field: Field, places: Tensor) -> tuple[Tensor, Tensor | None]:
    """Kernels [K, n, m, tokens, tokens] between positions; zero where they are not needed."""
    rows = field.pairs.find(places[:, None].expand(-1, len(places)), places.expand(len(places), -1))
    codes = places[:, None] * field.pairs.positions + places
    known = (field.pairs.codes[rows.clamp_min(0)] == codes)[..., None, None, None]
    k, t = (None if f is None else (f[rows] * known.to(f)).permute(2, 3, 4, 0, 1) for f in (field.k, field.t))
    assert k is not None  # noqa: S101
    return k, t


def every_pair(places: Tensor, positions: int) -> Pairs:
    """All pairs of some positions."""
    return Pairs.from_ends(places[:, None].expand(-1, len(places)), places.expand(len(places), -1), positions)


def check_independent(node: Node) -> None:
    """Refuse queries, keys and values that are functions of the same weights.

    Raises:
        NotReadableError: They are.
    """
    used = [
        {atom: {*units[part.units.reshape(-1)].reshape(-1).tolist()} - {-1} for atom, units in source.atoms.items()}
        for part, source in zip(parts(node), node.inputs, strict=True)
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        if any(used[i][atom] & used[j][atom] for atom in used[i].keys() & used[j].keys()):
            raise refusal(
                f"{node.step.label}, whose queries, keys and values are not projections of their own weights each,"
            )
