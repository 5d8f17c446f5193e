"""What the callbacks left on disk: scalars and pictures of every run under a folder, by TensorBoard or as files."""

import csv
import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from html import unescape
from pathlib import Path
from typing import TypeAlias

Series: TypeAlias = dict[int, float]

PICTURES = ("graphons", "ntk_spectrum", "loss_decay")
_EVENTS = "events.out.tfevents.*"
_CSV = "metrics.csv"
_TABLES = ("sparsity/layers", "graphon/layers")
_HINT = (
    "Train with a TensorBoardLogger or a CSVLogger and a callback of lightning-graphon, "
    "for example: lightning-graphon fit --preset full --config your.yaml"
)


@dataclass
class Run:
    """One training run.

    Attributes:
        name: Path below the folder that was asked for; "." for that folder itself.
        scalars: Key -> step -> value.
        pictures: Tag -> step -> bytes of a PNG file.
        damaged: Name of a file that could not be read to its end -> the reason.
    """

    name: str
    scalars: dict[str, Series] = field(default_factory=dict)
    pictures: dict[str, dict[int, bytes]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The last step at which anything was logged."""
        steps = {step for series in self.scalars.values() for step in series}
        return max(steps | {step for shown in self.pictures.values() for step in shown}, default=0)


def read_runs(folder: str | Path) -> list[Run]:
    """Every run in `folder` and below, sorted by name with numbers as numbers.

    A run is a folder with TensorBoard event files, with the `metrics.csv` of a CSVLogger, or with the PNG files that
    the callbacks write where no logger takes pictures.

    Raises:
        FileNotFoundError: There is no such folder, or no run in it; the message says where the nearest runs are.
    """
    top = Path(folder)
    if not top.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}.{_nearest_folder(top)}")
    runs = [_read(path, top) for path in _run_folders(top)]
    if not runs:
        raise FileNotFoundError(
            f"no runs under {str(folder)!r}: no TensorBoard events ({_EVENTS}), no {_CSV}, no pictures. "
            f"{_nearest_runs(top)}"
        )
    return sorted(runs, key=lambda run: _natural(run.name))


def _read(folder: Path, top: Path) -> Run:
    run = Run(folder.relative_to(top).as_posix())
    for tag in PICTURES:
        for path in _pictures(folder / tag):
            _try_to_read(partial(_add_picture, tag), run, path)
    if (folder / _CSV).is_file():
        _try_to_read(_add_csv, run, folder / _CSV)
    for path in sorted(folder.glob(_EVENTS)):  # a resumed run has several
        _try_to_read(_add_events, run, path)
    return run


def _try_to_read(add: Callable[[Run, Path], None], run: Run, path: Path) -> None:
    try:
        add(run, path)
    except Exception as error:  # whatever is wrong with one file, the others are worth a page
        run.damaged[path.name] = f"{type(error).__name__}: {error}"


def _add_events(run: Run, path: Path) -> None:
    """Scalars and pictures of one event file.

    Raises:
        EOFError: A record is damaged or cut off; what comes before it is in `run`.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.data_compat import migrate_event
    from tensorboard.util.tensor_util import make_ndarray

    # EventAccumulator stops without a word where a record is damaged.
    read = 0
    for record in RawEventFileLoader(str(path)).Load():
        read += len(record) + 16  # its length and two checksums stand around it
        event = migrate_event(Event.FromString(record))
        for value in event.summary.value:
            kind, content = value.metadata.plugin_data.plugin_name, make_ndarray(value.tensor)
            if kind == "scalars":
                run.scalars.setdefault(value.tag, {})[event.step] = content.item()
            elif kind == "images" and value.tag.lower() in PICTURES:  # Loss_decay in TensorBoard
                run.pictures.setdefault(value.tag.lower(), {})[event.step] = content[2]  # after width and height
            elif kind == "text" and value.tag.removesuffix("/text_summary") in _TABLES:
                _add_layers(run, content.item().decode(), event.step)
    if read < path.stat().st_size:
        raise EOFError(f"damaged or cut off after {read} of {path.stat().st_size} bytes")


def _add_layers(run: Run, table: str, step: int) -> None:
    """Scalars of layers from the table that TensorBoard has in place of them."""
    (_, *columns), _, *rows = ([unescape(cell.strip()) for cell in line[1:-1].split("|")] for line in table.split("\n"))
    for name, *cells in rows:
        for column, cell in zip(columns, cells, strict=True):
            key = f"sparsity/{name}" if column == "sparsity" else f"graphon/{name}/{column}"
            if cell:
                run.scalars.setdefault(key, {})[step] = float(cell)


def _add_csv(run: Run, path: Path) -> None:
    """Scalars of a CSVLogger: one row a step, empty cells where nothing was logged."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(float(row.pop("step", None) or 0))
            for key, text in row.items():
                if text:
                    run.scalars.setdefault(key, {})[step] = float(text)


def _add_picture(tag: str, run: Run, path: Path) -> None:
    run.pictures.setdefault(tag, {})[int(path.stem.removeprefix("step_"))] = path.read_bytes()


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*.png") if path.stem.removeprefix("step_").isdigit())


def _run_folders(top: Path) -> Iterator[Path]:
    """Folders that hold a run, `top` included; hidden ones are skipped."""
    for name, below, files in os.walk(top):
        below[:] = sorted(part for part in below if not part.startswith("."))
        folder = Path(name)
        if _CSV in files or any(folder.glob(_EVENTS)) or any(_pictures(folder / tag) for tag in PICTURES):
            yield folder


def _nearest_folder(path: Path) -> str:
    parent = next((part for part in path.parents if part.is_dir()), Path())
    missing = path.relative_to(parent).parts[0] if path.is_relative_to(parent) else path.name
    close = difflib.get_close_matches(missing, [part.name for part in parent.iterdir() if part.is_dir()], n=1)
    return f" Did you mean {str(parent / close[0])!r}?" if close else f" {str(parent)!r} is there."


def _nearest_runs(top: Path) -> str:
    """Where runs are, one level up: people give a checkpoint's folder, or a sibling of the one they mean."""
    above = top.resolve().parent
    if any(above.glob(_EVENTS)) or (above / _CSV).is_file():
        return f"There is one in {str(above)!r}."
    beside = sorted(
        path.name for path in above.iterdir() if path.is_dir() and (any(path.glob(_EVENTS)) or any(path.glob(_CSV)))
    )
    return f"There are runs in {str(above)!r}: {', '.join(beside[:5])}." if beside else _HINT


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts version_10 after version_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]
