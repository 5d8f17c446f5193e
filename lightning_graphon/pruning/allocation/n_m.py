"""N:M sparsity: of every M consecutive inputs of a unit, the N with the largest scores are kept."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import check_sparsity
from lightning_graphon._shared.choices import Schedule
from lightning_graphon._shared.weight_layout import WeightLayout, layout_of
from lightning_graphon.pruning.allocation.layer_budgets import floor_counts
from lightning_graphon.pruning.allocation.schedules import kept_after

_CHUNK = 1 << 20  # scores sorted at a time


@dataclass(frozen=True)
class NMPattern:
    """`keep` weights of every `group` consecutive inputs.

    >>> NMPattern.read("2:4")
    NMPattern(keep=2, group=4)
    """

    keep: int
    group: int

    @classmethod
    def read(cls, allocation: object) -> "NMPattern | None":
        """The pattern of a text such as "2:4"; None for every other allocation.

        Raises:
            ValueError: N is not in 1 .. M - 1.
        """
        found = re.fullmatch(r"(\d+):(\d+)", allocation) if isinstance(allocation, str) else None
        if found is None:
            return None
        keep, group = map(int, found.groups())
        if not 0 < keep < group:
            raise ValueError(f"allocation N:M keeps N of M weights with 0 < N < M, such as '2:4', got {allocation!r}")
        return cls(keep, group)

    @property
    def density(self) -> float:
        """Fraction kept, N / M."""
        return self.keep / self.group


def sparsity_of(allocation: object, sparsity: float | None) -> float:
    """The sparsity, which an N:M pattern gives by itself.

    Raises:
        TypeError: Neither of them gives a sparsity.
        ValueError: It contradicts the pattern, 1 - N/M.

    >>> sparsity_of("1:4", None)
    0.75
    """
    pattern = NMPattern.read(allocation)
    if pattern is None:
        if sparsity is None:
            raise TypeError("a method and a sparsity are needed, such as 'snip', sparsity=0.9; '2:4' has its own")
        return sparsity
    own = 1 - pattern.density
    if sparsity is not None and abs(check_sparsity(sparsity) - own) > 1e-9:
        raise ValueError(
            f"allocation {allocation!r} means sparsity {own:g}, but sparsity={sparsity!r} was given: leave sparsity out"
        )
    return own


@dataclass(frozen=True)
class GroupKeepCounts:
    """How many weights of every group are kept after each round.

    Attributes:
        pattern: The N:M pattern after the last round.
        layers: Name -> how the weight is stored; layers that are missing stay dense.
    """

    pattern: NMPattern
    layers: Mapping[str, WeightLayout]

    @classmethod
    def from_pattern(
        cls, model: nn.Module, pattern: NMPattern, shapes: Mapping[str, torch.Size], min_density: float | None
    ) -> "GroupKeepCounts":
        """Of the layers whose number of inputs is a multiple of M; one warning names the others.

        Raises:
            ValueError: There is no such layer, or `min_density` is above N/M.
        """
        layouts = {name: layout_of(model, name) for name in shapes}
        inputs = {name: layouts[name].matrix(shape)[1] for name, shape in shapes.items()}
        layers = {name: layout for name, layout in layouts.items() if inputs[name] % pattern.group == 0}
        for name in layers:
            total = shapes[name].numel()
            floor_counts({name: shapes[name]}, min_density, total // pattern.group * pattern.keep)
        _report_dense({name: n for name, n in inputs.items() if name not in layers}, pattern, bool(layers))
        return cls(pattern, layers)

    def select(self, scores: Mapping[str, Tensor], step: int, rounds: int, schedule: Schedule) -> dict[str, Tensor]:
        """The masks after round `step`."""
        keep, group = self.pattern.keep, self.pattern.group
        now = kept_after(group, self.pattern.density, keep, step, rounds, schedule)
        return {name: self._mask(name, score, now) for name, score in scores.items()}

    def _mask(self, name: str, score: Tensor, keep: int) -> Tensor:
        if name not in self.layers:
            return torch.ones_like(score, dtype=torch.bool)
        layout = self.layers[name]
        mask = keep_in_groups(layout.rows(score), keep, self.pattern.group)
        return layout.stored(mask).contiguous()


def keep_in_groups(score: Tensor, keep: int, group: int) -> Tensor:
    """Mask of the `keep` largest scores of every `group` consecutive inputs; among equal ones the earlier are kept.

    The groups of a convolution are groups of input channels, separate for each tap, as sparse tensor cores need them.

    `score` is [out, in, *taps] with `in` a multiple of `group`, without NaN.

    >>> keep_in_groups(torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]]), 2, 4).int()
    tensor([[1, 0, 1, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    # A sort returns indices of eight bytes per score, so only some rows are sorted at a time.
    rows = max(1, _CHUNK // score[0].numel())
    return torch.cat([_keep_in_groups(part, keep, group) for part in score.split(rows)])


def _keep_in_groups(score: Tensor, keep: int, group: int) -> Tensor:
    grouped = score.movedim(1, -1).unflatten(-1, (-1, group))
    # A stable sort keeps the earlier of equal scores.
    best = grouped.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    mask = torch.zeros(grouped.shape, dtype=torch.bool, device=score.device).scatter_(-1, best, True)
    return mask.flatten(-2).movedim(-1, 1)


def _report_dense(inputs: Mapping[str, int], pattern: NMPattern, fits_some: bool) -> None:
    """Warn of layers that an N:M pattern does not fit; raise if it fits none."""
    if not inputs:
        return
    shown = ", ".join(f"{name} ({n} inputs)" for name, n in inputs.items())
    reason = f"the inputs of these are no multiple of {pattern.group}, so {pattern.keep}:{pattern.group} does not fit"
    if not fits_some:
        raise ValueError(f"no layer to prune: {reason}: {shown}")
    warnings.warn(f"not pruned: {reason}: {shown}", stacklevel=6)
