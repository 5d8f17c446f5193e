"""N:M sparsity: of every M consecutive inputs of a unit, the N with the largest scores stay."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import check_sparsity
from lightning_graphon._shared.choices import Schedule
from lightning_graphon._shared.weight_layout import swap_sides, transposed_groups
from lightning_graphon.pruning.allocation.layer_budgets import floor_counts
from lightning_graphon.pruning.allocation.schedules import kept_after

_CHUNK = 1 << 20


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
        """The pattern that a text such as "2:4" means; None for every other allocation.

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
    """The sparsity asked for, which an N:M pattern says by itself.

    Raises:
        TypeError: There is none.
        ValueError: It contradicts the pattern, 1 - N/M.

    >>> sparsity_of("1:4", None)
    0.75
    """
    pattern = NMPattern.read(allocation)
    if pattern is None:
        if sparsity is None:
            raise TypeError("a method and a sparsity are needed, such as 'snip', sparsity=0.9; '2:4' says its own")
        return sparsity
    own = 1 - pattern.density
    if sparsity is not None and abs(check_sparsity(sparsity) - own) > 1e-9:
        raise ValueError(
            f"allocation {allocation!r} means sparsity {own:g}, but sparsity={sparsity!r} was given: leave sparsity out"
        )
    return own


@dataclass(frozen=True)
class GroupKeepCounts:
    """How many weights of every group stay after each round; what a layer needs to be read by groups.

    Attributes:
        pattern: N:M in the end.
        layers: Name -> groups of a transposed convolution, 0 for other layers; those that are not in it stay dense.
    """

    pattern: NMPattern
    layers: Mapping[str, int]

    @classmethod
    def from_pattern(
        cls, model: nn.Module, pattern: NMPattern, shapes: Mapping[str, torch.Size], min_density: float | None
    ) -> "GroupKeepCounts":
        """The layers whose inputs are whole groups; one warning names the others.

        Raises:
            ValueError: There is none, or `min_density` is above N/M.
        """
        sides = {name: transposed_groups(model, name) for name in shapes}
        inputs = {name: s[0] // sides[name] if sides[name] else s[1] for name, s in shapes.items()}
        layers = {name: side for name, side in sides.items() if inputs[name] % pattern.group == 0}
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
        groups = self.layers[name]
        mask = keep_in_groups(swap_sides(score, groups), keep, self.pattern.group)
        return swap_sides(mask, groups).contiguous()


def keep_in_groups(score: Tensor, keep: int, group: int) -> Tensor:
    """Mask of the `keep` largest scores of every `group` consecutive inputs; among equal ones the earlier stay.

    The groups of a convolution are of input channels, for each tap by itself: the order in which sparse tensor cores
    multiply.

    Args:
        score: [out, in, *taps], `in` a multiple of `group`; no NaN.
        keep: How many of each group.
        group: Size of the groups.

    Returns:
        Bool [out, in, *taps].

    >>> keep_in_groups(torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]]), 2, 4).int()
    tensor([[1, 0, 1, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    rows = max(1, _CHUNK // score[0].numel())  # so that the indices of a sort stay small
    return torch.cat([_keep_in_groups(part, keep, group) for part in score.split(rows)])


def _keep_in_groups(score: Tensor, keep: int, group: int) -> Tensor:
    grouped = score.movedim(1, -1).unflatten(-1, (-1, group))
    best = grouped.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    mask = torch.zeros(grouped.shape, dtype=torch.bool, device=score.device).scatter_(-1, best, True)
    return mask.flatten(-2).movedim(-1, 1)


def _report_dense(inputs: Mapping[str, int], pattern: NMPattern, some: bool) -> None:
    """Say which layers an N:M pattern does not fit."""
    if not inputs:
        return
    shown = ", ".join(f"{name} ({n} inputs)" for name, n in inputs.items())
    said = f"the inputs of these are no multiple of {pattern.group}, so {pattern.keep}:{pattern.group} does not fit"
    if not some:
        raise ValueError(f"no layer to prune: {said}: {shown}")
    warnings.warn(f"not pruned: {said}: {shown}", stacklevel=6)
