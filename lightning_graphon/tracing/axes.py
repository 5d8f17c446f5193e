"""Which units of a network are the same: one residual stream has one set of them."""

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lightning_graphon.tracing.steps import Input
from lightning_graphon.tracing.trace import Trace


def same_units(trace: Trace) -> Tensor:
    """Number [units] of each unit id's class: ids that sums, products and token concatenations make the same."""
    if not trace.joined:
        return torch.arange(trace.units)
    left, right = (torch.cat(side).numpy() for side in zip(*trace.joined, strict=True))
    graph = coo_matrix((np.ones(len(left)), (left, right)), (trace.units, trace.units))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


def exchangeable_groups(trace: Trace, classes: Tensor) -> Tensor:
    """Group [classes] of each class of units: those in the same steps, whose order does not matter.

    Inputs and outputs keep their identity and have the group -1.
    """
    count = int(classes.max()) + 1
    member = torch.zeros(count, len(trace.steps), dtype=torch.bool)
    for number, step in enumerate(trace.steps):
        member[classes[step.units], number] = True
    group = member.unique(dim=0, return_inverse=True)[1]
    for step in trace.steps:
        if isinstance(step, Input):
            group[classes[step.units]] = -1
    outputs = trace.output.step.units[trace.output.unit.unique()]
    group[classes[outputs]] = -1
    return group
