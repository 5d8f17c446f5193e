"""What a user sees of predicted and observed loss: a chart, a picture, a sentence."""

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_graphon.callbacks._loss.forecast import Forecast
from lightning_graphon.callbacks._loss.record import LossRecord
from lightning_graphon.plots import plot_loss_decay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AT_THE_END = ("rate_ratio", "log_correlation", "valid_until")
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


def summary(record: LossRecord, values: dict[str, float]) -> str:
    """How well the prediction did, in a sentence."""
    held = "held to the end" if record.void_from is None else _no_longer(record, record.void_from)
    return (
        f"loss_decay/...: the prediction {held}; over {int(values['points'])} points it was "
        f"{values['relative_error']:.1%} off, its decay rate {values['rate_ratio']:.2f} times the observed one"
    )


def _no_longer(record: LossRecord, step: int) -> str:
    """Nobody knows what was between two looks."""
    before = [at for at in record.by_step()["predicted"] if at < step]
    return f"held at step {before[-1]}, no longer at step {step}" if before else f"did not hold at step {step}"


def figure(record: LossRecord, initial: Forecast, kernel: str) -> "Figure":
    """Predicted and observed loss, the band of the finite probe, and the modes that carry the fall."""
    band = initial.band()
    steps = None if band is None else initial.start + torch.arange(len(band[0]))
    return plot_loss_decay(
        record.by_step(),
        band=None if band is None or steps is None else (steps, *band),
        void_from=record.void_from,
        shares=initial.shares(),
        title=f"Loss of {len(initial.outputs)} training samples, predicted from the {kernel} NTK",
    )
