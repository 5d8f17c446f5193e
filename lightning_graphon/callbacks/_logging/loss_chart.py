"""What a user sees of predicted and observed loss: curves, a picture, a sentence."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_graphon.dynamics import Forecast, LossCurves
from lightning_graphon.plots import plot_loss_decay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REACH = 2.0  # times the largest loss seen


def within_reach(values: Mapping[str, float], curves: LossCurves) -> dict[str, float]:
    """Without predictions beyond twice the largest loss seen: one that explodes would flatten all curves of a chart."""
    reach = _REACH * curves.largest
    pairs = (("predicted", "relative_error"), ("refreshed", "refreshed_error"))
    beyond = {key for pair in pairs if not abs(values.get(pair[0], 0.0)) <= reach for key in pair}
    return {name: value for name, value in values.items() if name not in beyond}


def picture_is_due(curves: LossCurves) -> bool:
    """After 8, 16, 32, ... measurements: a handful of pictures, however long the training."""
    count = len(curves.rows)
    return count >= 8 and not count & (count - 1)


def summary(curves: LossCurves, values: dict[str, float]) -> str:
    """How well the prediction did, in a sentence."""
    if values["points"] < 2:
        return f"loss_decay/...: the prediction {_held(curves)}, far above every loss"
    return (
        f"loss_decay/...: the prediction {_held(curves)}; over {int(values['points'])} points it was "
        f"{values['relative_error']:.1%} off, its decay rate {values['rate_ratio']:.2f} times the observed one"
    )


def _held(curves: LossCurves) -> str:
    """Nobody knows what was between two looks."""
    until, failed = curves.valid_until, curves.invalid_from
    if failed is None and until is not None and until < curves.last_step:
        return f"held at step {until}, the last at which it was followed"
    if failed is None:
        return "held to the end"
    return f"did not hold at step {failed}" if until is None else f"held at step {until}, no longer at step {failed}"


def figure(curves: LossCurves, initial: Forecast, ntk: str, *, with_modes: bool = False) -> "Figure":
    """Predicted and observed loss, and the modes that carry the fall."""
    return plot_loss_decay(
        curves.by_step(),
        invalid_from=curves.invalid_from,
        shares=initial.shares() if with_modes else None,
        title=f"{initial.followed}, predicted from the {ntk} NTK",
    )
