"""Numbers of the layers of a network, of as many as there is time for."""

from collections.abc import Callable, Iterable, Mapping
from time import perf_counter

from torch import Tensor

from lightning_graphon.graphon import HomogeneityTest, StepGraphon, homogeneity_test, motif_densities

PORTION = 0.5  # of the time budget, for the layers of one look
# Counting four-cycles multiplies a mask with itself: a few seconds for a layer of this many weights.
_LARGEST_FOR_CYCLES = 1 << 24


class LayersInTurn:
    """Does something for one layer after another, small ones first, until the time is over that it may take."""

    def __init__(self) -> None:
        self._pace = 0.0  # seconds of the last layer over its work

    def run(
        self, each: Callable[[str], None], names: Iterable[str], masks: Mapping[str, Tensor], seconds: float
    ) -> list[str]:
        """Call `each` with the names of layers.

        Returns:
            The layers that there was no time for, the largest last.
        """
        end, in_turn = perf_counter() + seconds, sorted(names, key=lambda name: masks[name].numel())
        for number, name in enumerate(in_turn):
            start, work = perf_counter(), masks[name].numel() ** 1.5  # a mask times itself
            if start + self._pace * work > end:
                return in_turn[number:]
            each(name)
            self._pace = (perf_counter() - start) / work
        return []


def layer_numbers(mask: Tensor, graphon: StepGraphon, alpha: float) -> tuple[dict[str, float], HomogeneityTest | None]:
    """Density, spread of degrees and, unless the layer is too large, four-cycles and the homogeneity test.

    Args:
        mask: Bool [out, in] or [out, in, *taps].
        graphon: Of the mask.
        alpha: Level of the test.
    """
    if mask.numel() > _LARGEST_FOR_CYCLES:
        spread = motif_densities(graphon)
        return {"density": spread.edge, "degree_cv": max(spread.row_degree_cv, spread.col_degree_cv)}, None
    test = homogeneity_test(mask, alpha=alpha)
    numbers = {
        "density": graphon.density,
        "degree_cv": max(test.row_degree_cv, test.col_degree_cv),
        "c4_ratio": test.c4_ratio,
        "p_value": test.p_value,
    }
    return numbers, test
