"""The flow of a network's graphons, from the first look of a training on, where masks change."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_graphon._shared.choices import LayerOrder
from lightning_graphon.graphon import FlowPoint, LayerFlow, StepGraphon

log = logging.getLogger("lightning_graphon.callbacks.graphon_monitor")
_BINS = 16  # at most: of finer cells a graphon in kept places is mostly noise


class GraphonFlows:
    """Follows masks from the first look of a training on; of masks that stay nothing is kept but themselves.

    Args:
        bins: Of each axis; 16 at most.
        order: How units are sorted at the start.

    Attributes:
        layers: Layer -> its flow, of those whose mask has changed.
        moving: Whether masks are known to change: then checkpoints have them from the start.
        resumed: Whether this goes on from a checkpoint, and has not looked since.
    """

    def __init__(self, bins: int, order: LayerOrder) -> None:
        self._bins, self._order = min(bins, _BINS), order
        self._starts: dict[str, tuple[Tensor, int]] = {}
        self._limits: dict[str, StepGraphon] = {}
        self.layers: dict[str, LayerFlow] = {}
        self.moving, self.resumed = False, False

    def begin(self, limits: Mapping[str, StepGraphon], moving: bool) -> None:
        """Training begins or goes on.

        Args:
            limits: Layer -> to which masks of the start's method tend, sorted by degree; others are taken as random.
            moving: Whether masks are known to change.
        """
        self.moving = moving
        self._limits.update(limits if not self.resumed else {})

    def look(self, name: str, mask: Tensor, step: int) -> dict[str, float]:
        """Follow a layer to where it is now.

        Args:
            name: Of the layer.
            mask: Bool [out, in, *taps]; kept, and not to be written to.
            step: Of training.

        Returns:
            Numbers to log; none where the mask has not changed since the start of training.
        """
        start, first = self._starts.setdefault(name, (mask, step))
        if start.shape != mask.shape:
            self._starts[name] = mask, step  # another network than the checkpoint's
            self.layers.pop(name, None)
            return {}
        if name not in self.layers:
            if torch.equal(start.to(mask.device), mask):
                return {}
            limit = self._limits.get(name)
            self.layers[name] = LayerFlow(start, first, bins=self._bins, order=self._order, limit=limit)
        flow = self.layers[name] = self.layers[name].to(mask.device)
        point = flow.look(mask, step)
        return {} if point is None else _numbers(point)

    def is_up_to(self, name: str, mask: Tensor) -> bool:
        """Whether the last look was at this mask."""
        flow = self.layers.get(name)
        last = self._starts[name][0] if flow is None and name in self._starts else None if flow is None else flow.last
        return last is not None and last.shape == mask.shape and torch.equal(last.to(mask.device), mask)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors only; empty while masks are not known to change."""
        if not self.moving and not self.layers:
            return {}
        waiting = {
            name: LayerFlow(mask, step, bins=self._bins, order=self._order, limit=self._limits.get(name))
            for name, (mask, step) in self._starts.items()
            if name not in self.layers
        }
        parts = {"layers": self.layers, "waiting": waiting}
        return {part: {name: flow.state_dict() for name, flow in flows.items()} for part, flows in parts.items()}

    @classmethod
    def from_state(cls, bins: int, order: LayerOrder, state: Mapping[str, Any]) -> "GraphonFlows":
        """Go on from `state_dict()`; anew, and told, from the state of something else."""
        flows = cls(bins, order)
        try:
            layers, waiting = (
                {name: LayerFlow.from_state(own) for name, own in state[part].items()} for part in ("layers", "waiting")
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            log.warning(
                "GraphonMonitor follows graphons from here on: the checkpoint's are none of its own (%r)", error
            )
            return flows
        for name, flow in (layers | waiting).items():
            flows._starts[name] = flow.start, flow.points[0].step
            flows._limits.update({} if flow.limit is None else {name: flow.limit})
        flows.layers, flows.resumed = layers, True
        return flows


def _numbers(point: FlowPoint) -> dict[str, float]:
    return {
        "moved": point.moved_last,
        "moved_from_start": point.moved,
        "moved_by_chance": point.by_chance,
        "limit_distance": point.limit_distance,
        "churn": point.churn,
        "dead_units": float(point.dead),
        "revived_units": float(point.revived),
    }
