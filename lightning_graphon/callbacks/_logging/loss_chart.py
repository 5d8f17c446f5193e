"""What a user sees of predicted and observed loss: curves, a picture, a sentence."""

import math
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING

from lightning_graphon.dynamics import CURVES, Forecast, LossCurves, LossTracker, PredictionsAhead, relative_error
from lightning_graphon.metrics import LossDecay
from lightning_graphon.plots import plot_loss_decay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REACH = 2.0  # times the largest loss seen


def within_reach(values: Mapping[str, float], curves: LossCurves) -> dict[str, float]:
    """Without predictions beyond twice the largest loss seen: one that explodes would flatten all curves of a chart."""
    reach = _REACH * curves.largest
    errors = {"predicted": "relative_error", "refreshed": "refreshed_error"}
    far = {n for n in CURVES[2:] if not abs(values.get(n, 0.0)) <= reach}
    beyond = far | {error for name, error in errors.items() if name in far}
    return {name: value for name, value in values.items() if name not in beyond}


def picture_is_due(curves: LossCurves) -> bool:
    """After 8, 16, 32, ... measurements: a handful of pictures, however long the training."""
    count = len(curves.rows)
    return count >= 8 and not count & (count - 1)


def summary(curves: LossCurves, theory: str, values: dict[str, float]) -> str:
    """How well the predictions did, in a sentence or two."""
    if values["points"] < 2:
        return f"loss_decay/...: the prediction {_held(curves)}, far above every loss"
    found = curves.by_step()
    named = {theory: "predicted", "rehearsal": "rehearsed", "sibling": "sibling", "power law": "power_law"}
    errors = {name: _median_error(found[curve], found["observed"]) for name, curve in named.items() if found[curve]}
    listed = ", ".join(f"{name} {error:.1%}" for name, error in errors.items())
    rate = f"the decay rate of the {theory} was {values['rate_ratio']:.2f} times the observed one"
    return f"loss_decay/...: the prediction {_held(curves)}. Median errors: {listed}; {rate}"


def _median_error(predicted: Mapping[int, float], observed: Mapping[int, float]) -> float:
    return median(relative_error(loss, observed[step]) for step, loss in predicted.items() if step in observed)


def _held(curves: LossCurves) -> str:
    """Nobody knows what was between two looks."""
    until, failed = curves.valid_until, curves.invalid_from
    if failed is None and until is not None and until < curves.last_step:
        return f"held at step {until}, the last at which it was followed"
    if failed is None:
        return "held to the end"
    return f"did not hold at step {failed}" if until is None else f"held at step {until}, no longer at step {failed}"


def agreement(curves: LossCurves, tolerance: float) -> LossDecay:
    """Agreement of prediction and observation so far."""
    metric, tensors = LossDecay(tolerance, sync_on_compute=False), curves.tensors()
    made = tensors["predicted"].isfinite()
    metric.update(*(tensors[name][made] for name in ("predicted", "observed", "step")))
    return metric


def announcement(copies: PredictionsAhead, tracker: LossTracker | None, probe: int, last: float) -> str:
    """What is predicted before training, by what, at which cost, and until when theory is trusted.

    Args:
        copies: What copies predict.
        tracker: Predicts by a kernel, now or later.
        probe: Samples whose loss is predicted.
        last: Step at which training ends; infinity where nothing ends it.
    """
    of = "" if math.isinf(last) else f" of {int(last):,}"
    lines = [f"LossDecayMonitor predicts the loss of {probe} training samples before it falls:"]
    if tracker is not None:
        what = f"from step {tracker.start_step} on" if tracker.initial is None else tracker.initial.followed
        without = f"; it leaves out {tracker.leaves_out}" if tracker.leaves_out else ""
        lines.append(f"  kernel: {what}, for as long as it holds{without}")
    for name, made in copies.predictions.items():
        if name != "kernel" and made.until is not None:
            orders = f", {len(made.losses)} orders of batches" if len(made.losses) > 1 else ""
            lines.append(f"  {name}: to step {made.until:,}{of}{orders}; {made.cost:g} training steps per step")
    if copies.predictions:
        lines.append(f"  {copies.seconds:.1f} s for all copies, of the time that time_budget allows")
    lines += [f"  no {name}: {why}" for name, why in copies.refused.items()]
    if copies.masks_move is not None:
        what = " and ".join(name for name in ("rehearsal", "replay") if name in copies.predictions)
        without = f"; {what} change them as training will" if what else ""
        lines.append(f"  Masks change from step {copies.masks_move:,} on, which kernel and sibling leave out{without}")
    rehearsal, theory = copies.predictions.get("rehearsal"), copies.theory
    if rehearsal is not None and theory is not None:
        until = copies.lazy_until
        found = f"not before step {rehearsal.until}" if until is None else f"at step {until}"
        lines.append(f"  Theory ({theory.name}) leaves what the network itself does {found}: so long training is lazy.")
    return "\n".join(lines)


def figure(
    curves: LossCurves, copies: PredictionsAhead, kernel: Forecast | None, *, ntk: str, tolerance: float, probe: int,
    with_modes: bool = False,
) -> "Figure":  # fmt: skip
    """Observed loss beside all that was predicted, and the modes that carry the fall.

    Args:
        curves: What was measured.
        copies: What copies predicted.
        kernel: The prediction of a kernel.
        ntk: Which one that is.
        tolerance: Of the band of the rehearsals.
        probe: Samples that are measured.
        with_modes: Whether to draw the modes of the kernel.
    """
    shown = curves.by_step()
    shown.pop("replayed", None)
    for name, curve in (("rehearsal", "rehearsed"), ("sibling", "sibling"), ("replay", "predicted")):
        made = copies.predictions.get(name)
        if made is not None and not (name == "replay" and kernel is not None):
            shown[curve] = dict(zip(made.steps.tolist(), made.mean.tolist(), strict=True))
    rehearsal = copies.predictions.get("rehearsal")
    if rehearsal is not None and "replay" not in copies.predictions and kernel is None:
        shown.pop("predicted", None)  # the rehearsal itself
    shown["power_law"] = curves.power_law()
    return plot_loss_decay(
        shown,
        band=None if rehearsal is None else (rehearsal.steps, *rehearsal.band(tolerance)),
        invalid_from=curves.invalid_from,
        lazy_until=copies.lazy_until,
        shares=kernel.shares() if with_modes and kernel is not None else None,
        title=_title(kernel, ntk, probe),
    )


def _title(kernel: Forecast | None, ntk: str, samples: int) -> str:
    if kernel is not None:
        return f"{kernel.followed}, predicted from the {ntk} NTK"
    return f"loss of {samples} training samples, predicted before training"
