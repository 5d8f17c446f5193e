"""`LayerFlow`: follows the mask of one layer and its graphon through training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_graphon._shared.bits import pack, unpack
from lightning_graphon._shared.choices import LayerOrder
from lightning_graphon.graphon.core.at_density import values_at_density
from lightning_graphon.graphon.core.step_graphon import StepGraphon
from lightning_graphon.graphon.distances.distances import l2_distance
from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.estimate import estimate_graphon
from lightning_graphon.graphon.flow.exchange import cell_distance, chance_distance, churn
from lightning_graphon.graphon.flow.positions import UnitPositions

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST_POINTS = 64  # then every other one is forgotten, but the first and the last
_CERTAIN = 1e4  # log-odds of a cell that has all weights


@dataclass(frozen=True)
class FlowPoint:
    """A mask at one look.

    Attributes:
        step: Of training.
        cells: Density [rows, cols] of each cell, float32, units where they stood at the start.
        moved: L2 distance of these cells from the start.
        moved_last: L2 distance of these cells from the look before.
        by_chance: `moved` if as many weights had been exchanged at random, root mean square.
        limit_distance: L2 distance of the graphon, sorted anew, from the limit at its density.
        churn: Share of the kept weights that were not kept at the look before.
        dead: Outputs without a weight.
        revived: Outputs with a weight that had none at the look before.
        row_degrees: Quantiles [5] (`QUANTILES`) over outputs of the share of their weights that is kept.
        col_degrees: Quantiles [5] over inputs.
    """

    step: int
    cells: Tensor
    moved: float
    moved_last: float
    by_chance: float
    limit_distance: float
    churn: float
    dead: int
    revived: int
    row_degrees: Tensor
    col_degrees: Tensor


class LayerFlow:
    """The path of a mask's graphon, from a first mask on.

    Units keep the places that they had in the first mask, sorted by degree. Distances contain noise, of which
    `FlowPoint.by_chance` is the measure.

    Args:
        mask: At the start, bool [out, in, *taps]; kept, and not to be written to.
        step: Of training.
        bins: Of each axis.
        order: How units are sorted at the start; see `UnitPositions.of`.
        limit: To which masks of the start's method tend, sorted by degree; None: of random masks, which is constant.

    Attributes:
        start: The first mask.
        last: The mask at the last look.
        limit: As given.
        points: What was seen, the start first; of more than 64 looks a part.

    >>> flow = LayerFlow(torch.eye(4).bool(), bins=2)
    >>> point = flow.look(torch.eye(4).bool().flip(0), step=100)
    >>> point.churn, point.moved, flow.look(flow.last, step=200)
    (1.0, 0.5, None)
    """

    def __init__(
        self, mask: Tensor, step: int = 0, *, bins: int = 16, order: LayerOrder = "degree",
        limit: StepGraphon | None = None,
    ) -> None:  # fmt: skip
        self.start = self.last = mask
        self._bins, self._order, self.limit = bins, order, limit
        self._positions = UnitPositions.of(mask, bins, order)
        self._sizes = self._positions.sizes(mask[0, 0].numel())
        self._counts = self._last_counts = self._positions.counts(mask)
        self.points = [self._point(mask, self._counts, step)]

    def look(self, mask: Tensor, step: int) -> FlowPoint | None:
        """Follow the mask to where it is now; None where it has not changed.

        Args:
            mask: Bool, of the first mask's shape; kept, and not to be written to.
            step: Of training.
        """
        if torch.equal(mask, self.last):
            return None
        counts = self._positions.counts(mask)
        point = self._point(mask, counts, step)
        self.points.append(point)
        if len(self.points) > _MOST_POINTS:
            self.points = [*self.points[:-1:2], point]
        self.last, self._last_counts = mask, counts
        return point

    @property
    def middle(self) -> FlowPoint:
        """The point that is nearest to half of the steps."""
        half = (self.points[0].step + self.points[-1].step) / 2
        return min(self.points, key=lambda point: abs(point.step - half))

    def _point(self, mask: Tensor, counts: Tensor, step: int) -> FlowPoint:
        dropped, grown = (int((a & ~b).count_nonzero()) for a, b in ((self.start, mask), (mask, self.start)))
        alive, before = (m.flatten(1).any(1) for m in (mask, self.last))
        rows, cols = ChannelGraph(mask).degrees()
        return FlowPoint(
            step=step,
            cells=(counts / self._sizes).float().cpu(),
            moved=cell_distance(self._counts, counts, self._sizes),
            moved_last=cell_distance(self._last_counts, counts, self._sizes),
            by_chance=chance_distance(self._counts, self._sizes, dropped, grown),
            limit_distance=l2_distance(estimate_graphon(mask, self._bins), self._limit_of(mask), align=False),
            churn=churn(self.last, mask),
            dead=int((~alive).count_nonzero()),
            revived=int((alive & ~before).count_nonzero()),
            row_degrees=_quantiles(rows / mask.shape[1]),
            col_degrees=_quantiles(cols / mask.shape[0]),
        )

    def _limit_of(self, mask: Tensor) -> StepGraphon:
        """The limit, at the density of a mask: all odds are multiplied by one factor."""
        density = float(mask.double().mean())
        if self.limit is None or density == 0:
            return StepGraphon([[density]])
        limit = self.limit.to("cpu", torch.float64)
        odds = torch.logit(limit.values).clamp(-_CERTAIN, _CERTAIN)
        values = values_at_density(odds, density, limit.row_measure, limit.col_measure)
        return StepGraphon(values, limit.row_measure, limit.col_measure)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors, masks at one bit per weight."""
        return {
            "shape": list(self.start.shape),
            "start": pack(self.start),
            "last": pack(self.last),
            "bins": self._bins,
            "order": self._order,
            "limit": None if self.limit is None else self.limit.state_dict(),
            "points": [asdict(point) for point in self.points],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "LayerFlow":
        """What `state_dict()` is of; on the CPU.

        Raises:
            KeyError, TypeError, ValueError: It is of something else.
        """
        start, last = (unpack(state[key], state["shape"]) for key in ("start", "last"))
        limit = None if state["limit"] is None else StepGraphon.from_state_dict(state["limit"])
        flow = cls(start, bins=int(state["bins"]), order=state["order"], limit=limit)
        flow.last, flow._last_counts = last, flow._positions.counts(last)
        flow.points = [FlowPoint(**point) for point in state["points"]]
        return flow

    def to(self, device: torch.device) -> "LayerFlow":
        """The same on another device, where the masks are that come."""
        if self.start.device != device:
            flow = LayerFlow(self.start.to(device), bins=self._bins, order=self._order, limit=self.limit)
            flow.last, flow.points = self.last.to(device), self.points
            flow._last_counts = flow._positions.counts(flow.last)
            return flow
        return self


def _quantiles(degrees: Tensor) -> Tensor:
    return torch.quantile(degrees.double().cpu(), torch.tensor(QUANTILES, dtype=torch.float64)).float()
