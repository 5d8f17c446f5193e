"""How far an exchange of weights moves a graphon, and how far as many would by chance."""

from torch import Tensor

from lightning_graphon._shared.checks import checked


@checked
def cell_distance(before: Tensor, after: Tensor, sizes: Tensor) -> float:
    """L2 distance of two step graphons on the same cells, from the numbers of kept weights in them.

    Args:
        before: Kept weights [rows, cols] of each cell.
        after: The same, later.
        sizes: Weights [rows, cols] of each cell, kept or not.

    >>> import torch
    >>> sizes = torch.tensor([[4, 4]])
    >>> cell_distance(torch.tensor([[4, 0]]), torch.tensor([[2, 2]]), sizes)
    0.5
    """
    change = (after - before).double()
    return float((change.square() / sizes).sum() / sizes.sum()) ** 0.5


@checked
def chance_distance(before: Tensor, sizes: Tensor, dropped: int, grown: int) -> float:
    """Root mean square of `cell_distance` if as many weights were dropped and grown anywhere, all equally likely.

    It is not zero without noise: random exchange moves every graphon toward the constant one.

    Args:
        before: Kept weights [rows, cols] of each cell.
        sizes: Weights [rows, cols] of each cell, kept or not.
        dropped: Kept weights that leave.
        grown: Weights that were not kept and come.

    >>> import torch
    >>> chance_distance(torch.tensor([[4, 0]]), torch.tensor([[4, 4]]), dropped=4, grown=4)
    1.0
    """
    kept, free = before.double(), (sizes - before).double()
    leave, come = _hypergeometric(kept, dropped), _hypergeometric(free, grown)
    square = (come[0] - leave[0]).square() + leave[1] + come[1]
    return float((square / sizes).sum() / sizes.sum()) ** 0.5


def _hypergeometric(cells: Tensor, drawn: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of how many of `drawn` items are of each cell."""
    total = float(cells.sum())
    if total <= 1:
        return cells * (drawn / max(total, 1.0)), cells * 0
    share = cells / total
    return drawn * share, drawn * share * (1 - share) * (total - drawn) / (total - 1)


@checked
def churn(before: Tensor, after: Tensor) -> float:
    """Share of the weights kept now that were not kept before.

    >>> import torch
    >>> churn(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    0.5
    """
    return float((after & ~before).count_nonzero()) / max(1, int(after.count_nonzero()))
