"""Figures to whatever a logger can take; files in the log directory where none takes pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def send_figure(trainer: pl.Trainer, tag: str, figure: "Figure", arrays: Mapping[str, np.ndarray]) -> None:
    """Show a figure in TensorBoard and in loggers with `log_image` (W&B); else write PNG and NPZ files.

    Args:
        trainer: Its loggers, step and log directory are used.
        tag: Name of the picture; also the folder of the files.
        figure: A figure outside pyplot.
        arrays: The numbers behind it, for the NPZ file.
    """
    pixels = _pixels(figure)
    shown = [_show(logger, tag, pixels, trainer.global_step) for logger in trainer.loggers]
    if not any(shown):
        folder = _folder(trainer) / tag
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{trainer.global_step:08d}"
        figure.savefig(folder / f"{name}.png", dpi=150)
        contents: dict[str, Any] = dict(arrays)
        np.savez_compressed(folder / f"{name}.npz", **contents)


def _folder(trainer: pl.Trainer) -> Path:
    """Log directory of the first logger; unlike `trainer.log_dir` it waits for no other process."""
    logger: Any = trainer.logger
    own = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    return Path(own or trainer.default_root_dir)


def _show(logger: Any, tag: str, pixels: np.ndarray, step: int) -> bool:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
        return True
    if hasattr(logger, "log_image"):
        logger.log_image(key=tag, images=[pixels], step=step)
        return True
    return False


def _pixels(figure: "Figure") -> np.ndarray:
    """RGB bytes [height, width, 3] of the figure."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
