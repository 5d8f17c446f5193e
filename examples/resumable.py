"""Long tables, cell by cell, a file each: a progress bar, and Ctrl-C keeps what is done."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CellT = TypeVar("CellT")


class Cell(NamedTuple):
    """One network; `method` is "dense" with sparsity 0, a pruning method, or the name of a design."""

    method: str
    sparsity: float
    seed: int

    @property
    def stem(self) -> str:
        """Name of its file."""
        return f"{self.method.replace(': ', '_')}_s{100 * self.sparsity:g}_t{self.seed}"

    @property
    def description(self) -> str:
        """What the progress bar says of it."""
        return f"{self.method}, {self.sparsity:.0%} pruned, seed {self.seed}"


def dense_and_pruned(methods: Iterable[str], sparsities: Iterable[float], seeds: int) -> list[Cell]:
    """The dense network, every method at every sparsity; a whole seed first: a stopped run has every point once."""
    grid = [("dense", 0.0), *product(methods, sparsities)]
    return [Cell(method, sparsity, seed) for seed in range(seeds) for method, sparsity in grid]


def finish(
    folder: Path,
    cells: Iterable[CellT],
    stem: Callable[[CellT], str],
    work: Callable[[CellT], Mapping[str, Any]],
    *,
    describe: Callable[[CellT], str],
    console: Console,
    cost: Callable[[CellT], float] = lambda cell: 1.0,
    kind: Literal["json", "npz"] = "json",
) -> dict[CellT, dict[str, Any]]:
    """Do the cells whose file is not there yet, then read all of them.

    Args:
        folder: Where the files are; it is made.
        cells: In the order in which they are computed.
        stem: Name of a cell's file.
        work: Computes a cell.
        describe: What the progress bar says of a cell.
        console: Where the bar is drawn.
        cost: Relative time of a cell, for the time left.
        kind: Of the files: "json" for numbers and lists, "npz" for arrays.

    Raises:
        SystemExit: Stopped by Ctrl-C; the files that are there stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {cell: folder / f"{stem(cell)}.{kind}" for cell in cells}
    todo = [cell for cell, path in paths.items() if not path.exists()]
    console.print(f"{len(paths)} networks, {len(paths) - len(todo)} of them already in {folder}")
    try:
        for cell in _with_progress(todo, describe, cost, console):
            _save(paths[cell], work(cell))
    except KeyboardInterrupt:
        left = sum(not path.exists() for path in paths.values())
        console.print(f"Stopped, {left} networks left. What is done is kept: the same command goes on from here.")
        raise SystemExit(130) from None
    return {cell: _load(path) for cell, path in paths.items()}


def _save(path: Path, result: Mapping[str, Any]) -> None:
    """All or nothing: a file is there only when it is complete, also with several runs at the same folder."""
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        if path.suffix == ".npz":
            np.savez_compressed(file, **result)
        else:
            file.write(json.dumps(result).encode())
    os.replace(part, path)


def _load(path: Path) -> dict[str, Any]:
    return dict(np.load(path)) if path.suffix == ".npz" else json.loads(path.read_text())


def _with_progress(
    todo: list[CellT], describe: Callable[[CellT], str], cost: Callable[[CellT], float], console: Console
) -> Iterator[CellT]:
    columns = (TextColumn("{task.description:42}"), BarColumn(16), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("nothing to compute" if not todo else "", total=sum(map(cost, todo)))
        for index, cell in enumerate(todo, start=1):
            progress.update(task, description=f"{index}/{len(todo)} {describe(cell)}")
            yield cell
            progress.advance(task, cost(cell))
