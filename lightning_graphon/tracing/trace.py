"""Read a module: the steps of its forward pass, checked against what it returns."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon.tracing.rules import install
from lightning_graphon.tracing.steps import Input, Step
from lightning_graphon.tracing.tracer import NotReadableError, Tracer, refusal
from lightning_graphon.tracing.views import View, array_layout

_SAMPLES = 2  # that are run: more than one, so that what goes from sample to sample is seen


@dataclass(frozen=True)
class Trace:
    """The steps of a forward pass.

    Attributes:
        steps: In order; those that the output does not need are left out.
        output: The model's output as a view of the last step.
        joined: Pairs of unit ids [n], [n] that are the same units.
        units: Number of unit ids.
    """

    steps: list[Step]
    output: View
    joined: list[tuple[Tensor, Tensor]]
    units: int


def trace(model: nn.Module, x: Tensor) -> Trace:
    """Steps of a module's forward pass in eval mode.

    Args:
        model: Any module of one input tensor and one output tensor.
        x: Samples [N, ...]; the first two are run.

    Raises:
        NotReadableError: It does something that has no rule; the message names the layer.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> [type(step).__name__ for step in trace(net, torch.rand(2, 1, 4, 4)).steps]
    ['Input', 'Affine', 'Pointwise', 'Affine']
    """
    x = x[:_SAMPLES]
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if x.is_floating_point() and floating is not None:
        x = x.to(floating)
    with eval_semantics(model, x.device), torch.no_grad():
        # Images have their channels first, tokens last; what comes later shows which of them these are.
        layouts = (False, True) if x.ndim > 2 and x.is_floating_point() else (True,)
        readings: list[Trace | NotReadableError] = []
        for channels_last in layouts:
            readings.append(_try(model, x, channels_last))
            if isinstance(readings[-1], Trace):
                return readings[-1]
    raise max((r for r in readings if not isinstance(r, Trace)), key=lambda error: error.steps)  # that came further


def _try(model: nn.Module, x: Tensor, channels_last: bool) -> "Trace | NotReadableError":
    try:
        return _trace(model, x, channels_last)
    except NotReadableError as error:
        return error


def _trace(model: nn.Module, x: Tensor, channels_last: bool) -> Trace:
    install()
    tracer = Tracer(model, channels_last)
    try:
        _record_input(tracer, x)
        with tracer.watching():
            out = model(x)
        if not isinstance(out, Tensor):
            raise NotReadableError(f"the model returns {type(out).__name__}, not a tensor")
        if id(out) not in tracer._views:
            raise refusal(f"what {type(model).__name__} returns, which torch functions did not compute,")
        view = tracer.view(out)
        _check(tracer, view, x, model(x))
    except NotReadableError as error:
        error.steps = len(tracer.steps)
        raise
    return _needed(tracer, view)


def _record_input(tracer: Tracer, x: Tensor) -> None:
    codes, units, positions, entries = array_layout(x.shape[1:], tracer.channels_last)
    if x.ndim > 2 and not tracer.channels_last:  # channels come first, whatever the sizes
        entries = torch.arange(x[0].numel()).reshape(x.shape[1], -1)
        codes, units, positions = entries.reshape(x.shape[1:]), *entries.shape
    if not x.is_floating_point() and x.ndim > 1:  # tokens
        entries = torch.arange(x[0].numel()).reshape(1, -1)
        codes, units, positions = entries.reshape(x.shape[1:]), 1, x[0].numel()
    step = Input("the input", tracer.new_units(units), positions, entries=entries)
    offset = torch.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) * entries.numel()
    tracer.record(x, step, codes + offset, [], lambda: x)


def _check(tracer: Tracer, output: View, x: Tensor, truth: Tensor) -> None:
    """Compute the output from the steps that were read."""
    arrays: list[Tensor] = []
    for step, (reads, run, codes) in zip(tracer.steps, tracer.replays, strict=True):
        tensors = [view.read(arrays[view.index]) for view in reads]
        arrays.append(View(0, step, codes).write(run(*tensors), len(x)))
    found = output.read(arrays[output.index])
    tolerance = 100 * torch.finfo(truth.dtype).eps ** 0.5
    same = found.shape == truth.shape
    if not same or float((found - truth).abs().max()) > tolerance * max(float(truth.abs().max()), 1e-30):
        raise NotReadableError(f"{type(tracer.model).__name__} does more than the layers that were seen in it")


def _needed(tracer: Tracer, output: View) -> Trace:
    """Without the steps that the output does not depend on."""
    needed = {output.index}
    for number in range(len(tracer.steps) - 1, -1, -1):
        if number in needed:
            needed.update(tracer.steps[number].inputs)
    kept = sorted(needed)
    place = {old: new for new, old in enumerate(kept)}
    for number in kept:
        step = tracer.steps[number]
        step.inputs = tuple(place[i] for i in step.inputs)
    view = View(place[output.index], output.step, output.codes)
    return Trace([tracer.steps[number] for number in kept], view, tracer.joined, tracer.units)
