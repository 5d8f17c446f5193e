"""Shows that an analysis is at work when it takes long, and leaves nothing on the screen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

import lightning.pytorch as pl
from rich.console import Console
from rich.control import Control
from rich.markup import escape
from rich.progress import Progress
from rich.segment import ControlType

DELAY = 2.0  # seconds after which an analysis is long
_consoles: list[Console] = []  # of the bars there are


@contextmanager
def progress_shown(
    trainer: pl.Trainer, what: str, *, verbose: bool, total: int | None = None
) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal of the first process once the body has taken some seconds; gone afterwards.

    Lightning's own bars stand still meanwhile, since no step is taken, and draw themselves anew at the next one.

    Args:
        trainer: Without a progress bar of its own, none is shown.
        what: Stands before the bar.
        verbose: Whether any is wanted.
        total: Number of rounds; None: the bar moves without end.

    Yields:
        To be called with the number of rounds done.
    """
    console = current_console()
    if not (verbose and console.is_interactive and trainer.is_global_zero and trainer.progress_bar_callback):
        yield lambda completed: None
        return
    bar = Progress(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task(escape(what), total=total)
    timer = Timer(DELAY, _start, [bar])
    timer.daemon = True  # a process that is killed does not wait for it
    timer.start()
    _consoles.append(console)
    try:
        yield lambda completed: bar.update(task, completed=completed)
    finally:  # also after Ctrl-C
        _consoles.remove(console)
        timer.cancel()
        timer.join()
        bar.stop()


def _start(bar: Progress) -> None:
    """In the place of the last line, where a bar of Lightning may stand: beside it ours would take two lines."""
    bar.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
    bar.start()


def current_console() -> Console:
    """Where to print: above a bar, if there is one. Names of layers such as "[/INST]" are text and no markup."""
    return _consoles[-1] if _consoles else Console(markup=False, emoji=False)
