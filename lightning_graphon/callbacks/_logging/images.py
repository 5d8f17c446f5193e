"""Pictures to whatever a logger can take; files in the log directory where none takes pictures."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_graphon.plots.picture import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILE_SCALE = 1.5  # files are kept to be printed


def send_picture(
    trainer: pl.Trainer, tag: str, draw: Callable[[float], Picture], arrays: Mapping[str, np.ndarray]
) -> None:
    """Show a picture in TensorBoard and in loggers with `log_image` (W&B); else write PNG and NPZ files.

    Args:
        trainer: Its loggers, step and log directory are used.
        tag: Name of the picture; also the folder of the files.
        draw: The picture at a scale: 1 is 100 dots an inch. Called once.
        arrays: The numbers behind it, for the NPZ file.
    """
    shows = [show for logger in trainer.loggers if (show := _show(logger))]
    picture = draw(1.0 if shows else _FILE_SCALE)
    for show in shows:
        show(tag, picture, trainer.global_step)
    if not shows:
        folder = _folder(trainer) / tag
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{trainer.global_step:08d}"
        (folder / f"{name}.png").write_bytes(picture.png())
        contents: dict[str, Any] = dict(arrays)
        np.savez_compressed(folder / f"{name}.npz", **contents)


def send_figure(trainer: pl.Trainer, tag: str, figure: "Figure", arrays: Mapping[str, np.ndarray]) -> None:
    """`send_picture` of a figure outside pyplot."""
    canvas: Any = figure.canvas

    def draw(scale: float) -> Picture:
        figure.set_dpi(100 * scale)
        canvas.draw()
        return Picture(np.asarray(canvas.buffer_rgba())[..., :3])

    send_picture(trainer, tag, draw, arrays)


def _folder(trainer: pl.Trainer) -> Path:
    """Log directory of the first logger; unlike `trainer.log_dir` it waits for no other process."""
    logger: Any = trainer.logger
    own = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    return Path(own or trainer.default_root_dir)


def _show(logger: Any) -> Callable[[str, Picture, int], None] | None:
    """How a logger shows a picture; None where it cannot."""
    if isinstance(logger, TensorBoardLogger):
        return lambda tag, picture, step: _to_tensorboard(logger.experiment, tag, picture, step)
    if hasattr(logger, "log_image"):
        return lambda tag, picture, step: logger.log_image(key=tag, images=[picture.rgb()], step=step)
    return None


def _to_tensorboard(writer: Any, tag: str, picture: Picture, step: int) -> None:
    """What `add_image` does, in a seventh of its time."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    if getattr(writer, "file_writer", None) is None:  # closed, or not torch's
        writer.add_image(tag, picture.rgb(), step, dataformats="HWC")
        return
    image = Summary.Image(height=picture.height, width=picture.width, colorspace=3, encoded_image_string=picture.png())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
