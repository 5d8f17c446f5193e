"""Long tables, cell by cell: a progress bar, and Ctrl-C keeps what is done."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

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


def compute_missing(
    paths: Mapping[CellT, Path],
    work: Callable[[CellT, Path], None],
    describe: Callable[[CellT], str],
    cost: Callable[[CellT], float],
    console: Console,
) -> None:
    """Do the cells whose file is not there yet.

    Args:
        paths: Cell -> the file that holds its result.
        work: Computes a cell and writes its file.
        describe: What the progress bar says of a cell.
        cost: Relative time of a cell, for the time left.
        console: Where the bar is drawn.

    Raises:
        SystemExit: Stopped by Ctrl-C; the files that are there stay.
    """
    todo = [cell for cell, path in paths.items() if not path.exists()]
    done = next((path.parent for path in paths.values()), "")
    console.print(f"{len(paths)} networks, {len(paths) - len(todo)} of them already in {done}")
    try:
        for cell in _with_progress(todo, describe, cost, console):
            work(cell, paths[cell])
    except KeyboardInterrupt:
        left = sum(not path.exists() for path in paths.values())
        console.print(f"Stopped, {left} networks left. What is done is kept: the same command goes on from here.")
        raise SystemExit(130) from None


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
