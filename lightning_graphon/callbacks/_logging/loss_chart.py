"""What a user sees of predicted and observed loss: a chart, a picture, a sentence."""

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_graphon.dynamics import Forecast, LossCurves
from lightning_graphon.plots import plot_loss_decay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Curves that belong together in one chart, under TensorBoard's "Custom scalars".
_LAYOUT = {
    "loss decay": {
        "predicted and observed loss": ["Multiline", [r"^loss_decay/(observed|predicted|refreshed)$"]],
        "how far off": ["Multiline", [r"^loss_decay/(relative_error|refreshed_error|kernel_drift)$"]],
    }
}


def chart_together(trainer: pl.Trainer) -> None:
    """One chart for the curves in every TensorBoard logger."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(_LAYOUT)


def summary(curves: LossCurves, values: dict[str, float]) -> str:
    """How well the prediction did, in a sentence."""
    return (
        f"loss_decay/...: the prediction {_held(curves)}; over {int(values['points'])} points it was "
        f"{values['relative_error']:.1%} off, its decay rate {values['rate_ratio']:.2f} times the observed one"
    )


def _held(curves: LossCurves) -> str:
    """Nobody knows what was between two looks."""
    until, failed = curves.valid_until, curves.invalid_from
    if failed is None:
        return "held to the end"
    return f"did not hold at step {failed}" if until is None else f"held at step {until}, no longer at step {failed}"


def figure(curves: LossCurves, initial: Forecast, ntk: str) -> "Figure":
    """Predicted and observed loss, the band of the finite probe, and the modes that carry the fall."""
    band = initial.band()
    steps = None if band is None else initial.start + torch.arange(len(band[0]))
    return plot_loss_decay(
        curves.by_step(),
        band=None if band is None or steps is None else (steps, *band),
        invalid_from=curves.invalid_from,
        shares=initial.shares(),
        title=f"Loss of {len(initial.outputs)} training samples, predicted from the {ntk} NTK",
    )
