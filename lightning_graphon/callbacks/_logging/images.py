"""Pictures to whatever a logger can take; files in the log directory where none takes pictures."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_DEFLATED, ZipFile

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from lightning_graphon._shared.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALE = 1.5  # 150 dots an inch: sharp in cards that are wider than the picture, and in print
# TensorBoard opens with capitals at the top: the first thing to see is whether the loss falls as predicted.
_TENSORBOARD_TAGS = {"loss_decay": "Loss_decay"}


def takes_pictures(trainer: pl.Trainer) -> bool:
    """Whether any logger shows pictures: TensorBoard, or one with `log_image` (W&B)."""
    return any(_show(logger) for logger in trainer.loggers)


def send_picture(trainer: pl.Trainer, tag: str, picture: Image.Image, arrays: Mapping[str, np.ndarray]) -> None:
    """Show a picture in every logger that takes pictures; where none does, write PNG and NPZ files.

    Args:
        trainer: Its loggers, step and log directory are used.
        tag: Name of the picture; also the folder of the files.
        picture: At `SCALE`.
        arrays: The numbers behind it, for the NPZ file.
    """
    for logger in trainer.loggers:
        if show := _show(logger):
            show(tag, np.asarray(picture), trainer.global_step)
    if not takes_pictures(trainer):
        folder = _folder(trainer) / tag
        folder.mkdir(parents=True, exist_ok=True)
        name, png = f"step_{trainer.global_step:08d}", io.BytesIO()
        picture.save(png, "png")
        write_file(folder / f"{name}.png", png.getvalue())
        write_file(folder / f"{name}.npz", npz(arrays))


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """As `np.savez_compressed`, for any names: that takes them as keywords beside its own."""
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    return buffer.getvalue()


def send_figure(trainer: pl.Trainer, tag: str, figure: "Figure", arrays: Mapping[str, np.ndarray]) -> None:
    """`send_picture` of a figure outside pyplot."""
    canvas: Any = figure.canvas
    figure.set_dpi(100 * SCALE)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    send_picture(trainer, tag, picture, arrays)


def _folder(trainer: pl.Trainer) -> Path:
    """Log directory of the first logger; unlike `trainer.log_dir` it waits for no other process."""
    logger: Any = trainer.logger
    own = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    return Path(own or trainer.default_root_dir)


def _show(logger: Any) -> Callable[[str, np.ndarray, int], None] | None:
    """How a logger shows RGB bytes [height, width, 3]; None where it cannot."""
    if isinstance(logger, TensorBoardLogger):
        return lambda tag, pixels, step: logger.experiment.add_image(
            _TENSORBOARD_TAGS.get(tag, tag), pixels, step, dataformats="HWC"
        )
    if hasattr(logger, "log_image"):
        return lambda tag, pixels, step: logger.log_image(key=tag, images=[pixels], step=step)
    return None
