"""Read which units of a network can go: their labels, constants, who needs whom; a file for each kind of function."""

from lightning_graphon.compact.reading import attention, layers, movement, pointwise


def install() -> None:
    """Importing the files registers their rules."""
    _ = attention, layers, movement, pointwise
