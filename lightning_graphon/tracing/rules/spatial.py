"""Linear maps over positions, the same for every unit: average pooling, means and sums over positions."""

import torch
from torch import Tensor

from lightning_graphon.tracing.steps import Spatial
from lightning_graphon.tracing.tracer import Call, Tracer, refusal, rule
from lightning_graphon.tracing.views import encode

_LINEAR = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "mean", "sum", "interpolate", "upsample",
)  # fmt: skip


@rule(*_LINEAR)
def _pool(tracer: Tracer, call: Call) -> None:
    view = tracer.view(call.tracked[0])
    sample, unit, position = (t[:1] for t in (view.sample, view.unit, view.position))
    varies = [d for d in range(1, unit.ndim) if not bool((unit == unit.narrow(d, 0, 1)).all())]
    if len(varies) > 1 or bool((sample != 0).any()) or bool((view.codes < 0).any()):
        raise refusal(f"{call.label}, which mixes units,")
    places = position.narrow(varies[0], 0, 1) if varies else position
    # The map itself, on each position's indicator, and on the units' numbers to see where they go.
    basis = (places == torch.arange(view.step.positions).reshape(-1, *[1] * (places.ndim - 1))).to(call.out.dtype)
    weights = call.run(basis)
    units = _units(call, unit)
    if units is None or len(units) != 1 or weights.ndim < 2 or len(weights) != view.step.positions:
        raise refusal(f"{call.label}, which mixes units or samples,")
    shape = weights.shape[1:]
    matrix = weights.flatten(1).T.cpu()
    step = Spatial(call.label, view.step.units, len(matrix), (view.index,), weights=matrix)
    samples = torch.arange(len(call.out)).reshape(-1, *[1] * len(shape))
    codes = encode(samples, units, torch.arange(len(matrix)).reshape(1, *shape), step)
    tracer.record(call.out, step, codes.expand(call.out.shape), [view], call.run)


def _units(call: Call, unit: Tensor) -> Tensor | None:
    """The unit of each output entry; None where one of them reads several."""
    number = unit.double()
    total = call.run(torch.ones_like(number))
    if bool((total == 0).any()):
        return None
    mean, square = call.run(number) / total, call.run(number.square()) / total
    units = mean.round()
    near = 1e-6 * (1 + square.abs().max())
    return units.long() if bool(((square - units.square()).abs() < near).all()) else None
