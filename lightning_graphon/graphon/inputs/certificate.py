"""The certificate of universal approximation for a named set of inputs: a rectangle of the first layer's graphon.

[P2] (Pham, Ta, Tran-Thanh, ICML 2026, arXiv:2602.06675) needs, for functions of k inputs, one set of k active inputs
and a set of units of measure α > 0 that is joined to each of them with at least the probability p, and α n pᵏ → ∞ with
the number n of units. It need not hold for all sets, which is what `covered_order` asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.graphon.core.step_graphon import StepGraphon
from lightning_graphon.graphon.inputs.expressivity import check_inputs, rows_of, units_of


@dataclass(frozen=True)
class RectangleCertificate:
    """The best rectangle for a set of inputs.

    Attributes:
        units: The largest α(p) n pᵏ over p: at least so many units are expected to be joined to all k inputs.
        floor: The p where it is attained: each unit of the rectangle has each input with this probability at least.
        measure: α(p), the share of the units that do.
        order: Largest number of the inputs, taken from the set in any way, for which α(p) n p^order reaches the number
            of units that is needed, at the best p; 0 if none.
    """

    units: float
    floor: float
    measure: float
    order: int


@checked
def rectangle_certificate(
    first: Tensor | StepGraphon, inputs: Sequence[int], units: int | None = None, *, needed: float = 1.0
) -> RectangleCertificate:
    """The largest α(p) n pᵏ for k named inputs, where α(p) is the measure of {u: W(u, v_j) >= p for all of them}.

    A finite network has no limit to go to infinity, so this is a number to compare: networks of growing width fulfil
    the theorem's condition for the set if it grows beyond all bounds, and `order` is the number of inputs up to which
    this one network has at least `needed` such units. A mask has p = 1 only: the number is the exact count of its units
    that are joined to all.

    Args:
        first: Mask [out, in] of the first layer, or its graphon with a column for each input.
        inputs: Columns, all different.
        units: Number n of hidden units, with a graphon.
        needed: Number of units that certifies.

    Raises:
        ValueError: No input, two that are the same, or `units` is missing or does not fit.
        IndexError: An input that the layer does not have.

    >>> rectangle_certificate(StepGraphon([[0.8, 0.5], [0.1, 0.9]]), [0, 1], units=100)
    RectangleCertificate(units=12.5, floor=0.5, measure=0.5, order=2)
    """
    values, measure = rows_of(first)
    columns = check_inputs(values, inputs)
    if not len(columns):
        raise ValueError("inputs is empty: name at least one column")
    count = units_of(first, units)
    # α is a step function of p, so the largest product is at a value of the smallest edge probability of some row.
    floors, order = values[:, columns].amin(1).sort(descending=True)
    shares = measure[order].cumsum(0)

    def best(size: int) -> tuple[float, int]:
        products = shares * count * floors**size
        return float(products.max()), int(products.argmax())

    # A tolerance for sums of many shares.
    certified = [size for size in range(1, len(columns) + 1) if best(size)[0] >= needed * (1 - 1e-9)]
    value, place = best(len(columns))
    found = value > 0
    return RectangleCertificate(
        value, float(floors[place]) if found else 0.0, float(shares[place]) if found else 0.0, max(certified, default=0)
    )
