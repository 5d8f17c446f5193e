"""The largest computation that a number of seconds allows, found by doing smaller ones first."""

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeVar

from lightning_graphon._shared.memory import is_out_of_memory

Size = TypeVar("Size")
Result = TypeVar("Result")
_MARGIN = 1.5  # of an estimated time


def largest_affordable(
    run: Callable[[Size], Result], sizes: Sequence[Size], work: Callable[[Size], float], seconds: float
) -> tuple[Result, Size]:
    """Run ever larger sizes, each only where its time, estimated from the two before, fits what is left.

    With unlimited seconds only the largest is run. Where memory runs out, the largest that did fit is the result.

    Args:
        run: Computes one size.
        sizes: From the smallest, which is always run, to the one that is wanted.
        work: What a size costs at most, up to a factor and a constant.
        seconds: For all runs together.

    Returns:
        The last result, and its size.

    >>> largest_affordable(lambda n: n**2, [1, 4, 16], float, math.inf)
    (256, 16)
    """
    if math.isinf(seconds):
        return run(sizes[-1]), sizes[-1]
    end, number = perf_counter() + seconds, 0
    result, taken = _timed(run, sizes[0])
    if taken < seconds / 4:
        result, taken = _timed(run, sizes[0])  # the first time of all holds what is done only once
    constant, per_work = 0.0, taken / work(sizes[0])
    while number < len(sizes) - 1:
        left = end - perf_counter()
        fits = [
            i for i, size in enumerate(sizes) if i > number and _MARGIN * (constant + per_work * work(size)) <= left
        ]
        if not fits:
            break
        try:
            larger, longer = _timed(run, sizes[fits[-1]])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        more = work(sizes[fits[-1]]) - work(sizes[number])
        per_work = max(longer - taken, 0.1 * longer) / more if more > 0 else per_work
        constant = max(0.0, longer - per_work * work(sizes[fits[-1]]))
        number, result, taken = fits[-1], larger, longer
    return result, sizes[number]


def kernel_work(rows: int, columns: int) -> float:
    """What the mean over `columns` of kernels between `rows` costs: passes through the network, products of all pairs.

    A pass costs about as much as 32 products of a row.
    """
    return float(rows * (rows + 32) * columns)


def _timed(run: Callable[[Size], Result], size: Size) -> tuple[Result, float]:
    start = perf_counter()
    result = run(size)
    return result, max(perf_counter() - start, 1e-6)
