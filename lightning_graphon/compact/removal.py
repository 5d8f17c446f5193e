"""Which units go: those that nobody needs, with all that must go with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon.compact.reading.units import FIXED
from lightning_graphon.compact.reading.watcher import Reading, Stored

_STREAM = "what goes with it is needed (a stream, group or head)"
_LAST = "a layer keeps one unit at least"


@dataclass(frozen=True, eq=False)
class Removal:
    """What goes.

    Attributes:
        gone: Whether [labels] a unit goes.
        need: Whether [labels] a unit is needed.
        reasons: Why a unit stays that is not needed, by label.
        axes: Axis of each stored parameter along which it is cut, by id.
    """

    gone: Tensor
    need: Tensor
    reasons: dict[int, str]
    axes: dict[int, int]


def plan_removal(reading: Reading, cautious: bool) -> Removal:
    """Decide.

    Args:
        reading: What was read.
        cautious: Whether units stay whose place code may count on.
    """
    need = torch.zeros(reading.units.count, dtype=torch.bool)
    for record in reversed(reading.records):
        record.pull(need)
    classes = reading.units.classes()
    why = _Stays(classes)
    why.add(torch.tensor([FIXED]), "it is an input of the network, or an operation without a rule reads it")
    for labels, reason in reading.units.pinned + (reading.units.doubtful if cautious else []):
        why.add(labels, reason)
    why.add(need.nonzero().flatten(), _STREAM)
    axes = _stored_axes(reading, classes, why)
    _keep_one(reading, why)
    reasons = {label: why.reasons[int(classes[label])] for label in (~need).nonzero().flatten().tolist()
               if int(classes[label]) in why.reasons}  # fmt: skip
    return Removal(~why.stays[classes], need, reasons, axes)


class _Stays:
    """Classes that stay, and the first reason of each."""

    def __init__(self, classes: Tensor) -> None:
        self.classes = classes
        self.stays = torch.zeros(int(classes.max()) + 1, dtype=torch.bool)
        self.reasons: dict[int, str] = {}

    def add(self, labels: Tensor, reason: str) -> None:
        found = self.classes[labels].unique()
        self.reasons.update(dict.fromkeys(found[~self.stays[found]].tolist(), reason))
        self.stays[found] = True


def _stored_axes(reading: Reading, classes: Tensor, why: _Stays) -> dict[int, int]:
    """The axis along which each parameter outside layers can be cut; where there is none all of it stays."""
    own = torch.zeros(len(classes), dtype=torch.bool)
    for stored in reading.stored.values():
        own[stored.labels.reshape(-1)] = True
    others = torch.zeros_like(why.stays)
    others[classes[~own]] = True
    why.add((~others[classes]).nonzero().flatten(), "it is no layer's unit")
    axes = {}
    for key, stored in reading.stored.items():
        axis = _axis(stored, classes)
        if axis is None:
            why.add(stored.labels.reshape(-1), "a parameter of several axes belongs to it")
        else:
            axes[key] = axis
    return axes


def _axis(stored: Stored, classes: Tensor) -> int | None:
    found = classes[stored.labels]
    for axis in range(found.ndim):
        table = found.movedim(axis, -1).reshape(-1, found.shape[axis])
        if bool((table == table[:1]).all()):
            return axis
    return None


def _keep_one(reading: Reading, why: _Stays) -> None:
    for slot in reading.slots.values():
        if not bool(why.stays[why.classes[slot.labels]].any()):
            why.add(slot.labels[:1], _LAST)
    # Other axes may have been of the same units.
    if any(not bool(why.stays[why.classes[slot.labels]].any()) for slot in reading.slots.values()):
        _keep_one(reading, why)
