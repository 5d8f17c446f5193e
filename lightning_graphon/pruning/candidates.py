"""The weights of a network that can be pruned, and patterns that name them."""

import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_graphon._shared.checks import nearest
from lightning_graphon._shared.weight_layout import weight_axes
from lightning_graphon.pruning.sharding import unsharded_class

Pattern: TypeAlias = str | type[nn.Module]
LayerPatterns: TypeAlias = Pattern | Sequence[Pattern] | None

# Modules with several weights in one parameter: pruned if `include` names them, else skipped with a warning.
FUSED_KEYS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    nn.RNNBase: ("weight_ih_", "weight_hh_", "weight_hr_"),
    nn.RNNCellBase: ("weight_ih", "weight_hh"),
    nn.Bilinear: ("weight",),
}
LAYER, FUSED, OTHER = range(3)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A parameter that can be pruned: its first name, its module, and all names that a pattern may use."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    aliases: frozenset[str]
    kind: int

    @property
    def by_default(self) -> bool:
        """Whether it is pruned where `include` names nothing."""
        return self.kind == LAYER and self.parameter.requires_grad

    @property
    def tier(self) -> tuple[bool, bool]:
        """What `include` takes last: frozen weights, and parameters that are no layer's."""
        return not self.parameter.requires_grad, self.kind == OTHER

    def matches(self, pattern: Pattern) -> bool:
        """Whether a name, glob, regular expression or module type means this weight."""
        if isinstance(pattern, type):
            return isinstance(self.module, pattern)
        if pattern.startswith("re:"):
            return any(re.search(pattern[3:], alias) for alias in self.aliases)
        return any(fnmatchcase(alias, pattern) for alias in self.aliases)


def find_candidates(model: nn.Module) -> list[Candidate]:
    """Every weight that could be pruned, trainable or frozen, once, in the order of named_parameters()."""
    # Every place of a parameter: a tied weight can be named by any of them.
    places: dict[nn.Parameter, list[tuple[str, str, nn.Module]]] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    for path, module in modules:
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((path, key, module))
    inside_metrics = tuple(_metric_paths(modules))
    found = [
        _candidate(name, parameter, places[parameter])
        for name, parameter in model.named_parameters()
        if not name.startswith(inside_metrics)
    ]
    return [c for c in found if _is_matrix(c)]


def _candidate(name: str, parameter: nn.Parameter, places: Sequence[tuple[str, str, nn.Module]]) -> Candidate:
    kind, module = min(((_kind(m, key), m) for _, key, m in places), key=lambda pair: pair[0])
    aliases = {a for p, k, m in places for a in (qualified(p, k), *ancestors(p), unsharded_class(m).__name__)}
    return Candidate(name, parameter, module, frozenset(aliases - {""}), kind)


def _kind(module: nn.Module, key: str) -> int:
    if key in weight_axes(module):
        return LAYER
    fused = any(isinstance(module, kind) and key.startswith(keys) for kind, keys in FUSED_KEYS.items())
    return FUSED if fused else OTHER


def _is_matrix(candidate: Candidate) -> bool:
    parameter = candidate.parameter
    if isinstance(parameter, UninitializedParameter):  # which may become a bias
        return candidate.kind == LAYER
    return parameter.ndim > 1 and parameter.numel() > 0


def ancestors(path: str) -> list[str]:
    """The module's path and those of the modules that contain it, so that a container's name selects its content."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _metric_paths(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Prefixes of torchmetrics metrics, whose networks (FID's Inception) are not trained."""
    return [
        path + "."
        for path, module in modules
        if path and any(c.__module__.startswith("torchmetrics") for c in type(module).__mro__)
    ]


def qualified(path: str, key: str) -> str:
    """Qualified name of a module's parameter."""
    return f"{path}.{key}" if path else key


def both_patterns(include: LayerPatterns, exclude: LayerPatterns) -> tuple[list[Pattern], list[Pattern]]:
    """Both arguments as lists; a name in both is an error."""
    wanted, unwanted = as_patterns(include, "include"), as_patterns(exclude, "exclude")
    both = {p for p in wanted if isinstance(p, str)} & {p for p in unwanted if isinstance(p, str)}
    if both:
        raise ValueError(f"include and exclude both name {sorted(both)}; remove it from one of them")
    return wanted, unwanted


def as_patterns(patterns: LayerPatterns, argument: str) -> list[Pattern]:
    """A list of patterns from one of them, or from any sequence or set.

    Raises:
        TypeError: There is something else.
        ValueError: A regular expression is none.
    """
    if patterns is None:
        return []
    if not isinstance(patterns, (str, type, Sequence, Set)):
        raise TypeError(
            f"{argument} takes names, globs, 're:...', nn.Module types, or a list of these, got {patterns!r}"
        )
    items = [patterns] if isinstance(patterns, (str, type)) else list(patterns)
    for item in items:
        if isinstance(item, str) and item.startswith("re:"):
            _check_regex(argument, item)
        if not (isinstance(item, str) or (isinstance(item, type) and issubclass(item, nn.Module))):
            raise TypeError(f"{argument} takes names, globs, 're:...' or nn.Module types, got {item!r}")
    return items


def _check_regex(argument: str, pattern: str) -> None:
    try:
        re.compile(pattern[3:])
    except re.error as error:
        raise ValueError(f"{argument} pattern {pattern!r} is not a regular expression: {error}") from error


def check_matches(argument: str, pattern: Pattern, candidates: Sequence[Candidate]) -> None:
    """Raise where a pattern matches none of the candidates; the message suggests the nearest."""
    if any(c.matches(pattern) for c in candidates):
        return
    shown = pattern.__name__ if isinstance(pattern, type) else pattern
    also = sorted({alias for c in candidates for alias in c.aliases})  # modules and classes
    hint = nearest(shown, [c.name for c in candidates if c.by_default] or [c.name for c in candidates], also)
    raise ValueError(f"{argument} pattern {shown!r} matches no prunable weight. {hint}")


def taken(pattern: Pattern, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of the weights that a pattern of `include` matches, those of the first tier that has any."""
    check_matches("include", pattern, candidates)
    matched = [c for c in candidates if c.matches(pattern)]
    first = min(c.tier for c in matched)
    return [c for c in matched if c.tier == first]


def patterns_for(wanted: Sequence[Candidate], candidates: Sequence[Candidate]) -> list[str]:
    """A few patterns by which `include` takes all of these: class names, containers or names."""
    patterns: list[str] = []
    reached: set[str] = set()
    for c in wanted:
        if c.name not in reached:
            path = c.name.rpartition(".")[0]
            options = [*[type(c.module).__name__] * bool(path), *ancestors(path), c.name]
            found = ((option, {t.name for t in taken(option, candidates)}) for option in options if option)
            pattern, names = next((option, names) for option, names in found if c.name in names)
            patterns.append(pattern)
            reached |= names
    return patterns
