"""Select weights to prune by name, glob, regular expression or module type."""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_graphon._shared.checks import as_kind, nearest
from lightning_graphon.pruning.sharding import unsharded_class

Pattern: TypeAlias = str | type[nn.Module]
LayerPatterns: TypeAlias = Pattern | Sequence[Pattern] | None

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Modules with several weights in one parameter: pruned if `include` names them, else skipped with a warning.
FUSED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    nn.RNNBase: ("weight_ih_", "weight_hh_", "weight_hr_"),
    nn.RNNCellBase: ("weight_ih", "weight_hh"),
    nn.Bilinear: ("weight",),
}


@dataclass(frozen=True)
class _Candidate:
    """A parameter that can be pruned: its first name, its module, and all names that a pattern may use."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    aliases: frozenset[str]
    by_default: bool

    def matches(self, pattern: Pattern) -> bool:
        if isinstance(pattern, type):
            return isinstance(self.module, pattern)
        if pattern.startswith("re:"):
            return any(re.search(pattern[3:], alias) for alias in self.aliases)
        return any(fnmatchcase(alias, pattern) for alias in self.aliases)


def select_weights(
    model: nn.Module, include: LayerPatterns = None, exclude: LayerPatterns = None
) -> dict[str, nn.Parameter]:
    """Weights to prune, by qualified parameter name, in the order of `model.named_parameters()`.

    By default the `weight` of every Linear, Conv and ConvTranspose layer; never biases, normalisation, frozen
    parameters or anything inside a torchmetrics metric. The fused weights of attention, recurrent and bilinear layers
    are selected if `include` names them. A tied weight appears once.

    Args:
        model: Any module.
        include: Weights to select: qualified parameter or module names ("encoder", "encoder.0.weight"), globs
            ("encoder.*.weight"), regular expressions ("re:^encoder"), class names ("Conv2d") or module types.
        exclude: Weights to leave out, in the same forms.

    Returns:
        The parameters themselves, by qualified name.

    Raises:
        TypeError: A pattern is neither a string nor a module type.
        ValueError: A pattern matches nothing, `include` and `exclude` name the same layer, a selected
            layer is not built yet, or nothing is selected.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> list(select_weights(net))
    ['0.weight', '2.weight']
    >>> list(select_weights(net, exclude="2"))
    ['0.weight']
    """
    candidates = _candidates(as_kind("model", model, nn.Module))
    # Frozen weights are only needed for messages about patterns.
    wanted, unwanted = _both_patterns(include, exclude)
    frozen = _candidates(model, frozen=True) if wanted or unwanted else []
    for pattern in wanted:
        if not any(c.matches(pattern) for c in candidates) and any(c.matches(pattern) for c in frozen):
            raise ValueError(
                f"include pattern {pattern!r} matches no prunable weight: frozen ones only (requires_grad=False)"
            )
        _check_matches("include", pattern, candidates)
    for pattern in unwanted:
        _check_matches("exclude", pattern, [*candidates, *frozen])
    chosen = [
        c
        for c in candidates
        if (any(c.matches(p) for p in wanted) if wanted else c.by_default) and not any(c.matches(p) for p in unwanted)
    ]
    if not wanted:
        _report_fused([c for c in candidates if not c.by_default and not any(c.matches(p) for p in unwanted)])
        _report_computed(model)
    if not chosen:
        raise ValueError(_nothing_selected(model, include, exclude))
    _check_built(chosen)
    return {c.name: c.parameter for c in chosen}


def check_patterns(model: nn.Module, include: LayerPatterns = None, exclude: LayerPatterns = None) -> None:
    """Raise unless every pattern names a weight that can be pruned, now or once it is no longer frozen.

    Raises:
        TypeError: A pattern is neither a string nor a module type.
        ValueError: A pattern matches nothing (the message suggests the nearest), or both arguments name the same.
    """
    weights = [*_candidates(model), *_candidates(model, frozen=True)]
    for argument, patterns in zip(("include", "exclude"), _both_patterns(include, exclude), strict=True):
        for pattern in patterns:
            _check_matches(argument, pattern, weights)


def match_layers(pattern: Pattern, model: nn.Module, names: Iterable[str]) -> list[str]:
    """The `names` of selected weights that `pattern` matches.

    Raises:
        ValueError: It matches none of them; the message suggests the nearest.
    """
    allowed = set(names)
    candidates = [c for c in _candidates(model) if c.name in allowed]
    _check_matches("allocation", pattern, candidates)
    return [c.name for c in candidates if c.matches(pattern)]


def _candidates(model: nn.Module, frozen: bool = False) -> list[_Candidate]:
    """Every trainable (or frozen) weight that could be pruned, once, in the order of named_parameters()."""
    # Every place of a parameter: a tied weight can be named by any of them.
    places: dict[nn.Parameter, list[tuple[str, str, nn.Module]]] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    for path, module in modules:
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((path, key, module))
    inside_metrics = _metric_paths(modules)
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == frozen or _is_empty(parameter) or any(name.startswith(p) for p in inside_metrics):
            continue
        for _, key, module in places[parameter]:
            kind = _kind(module, key)
            if kind is not None:
                aliases = {
                    a
                    for p, k, m in places[parameter]
                    for a in (qualified(p, k), *_ancestors(p), unsharded_class(m).__name__)
                }
                found.append(_Candidate(name, parameter, module, frozenset(aliases - {""}), kind == "default"))
                break
    return found


def _kind(module: nn.Module, key: str) -> str | None:
    """How a parameter is pruned: 'default', 'fused' (only on request) or None (never)."""
    if isinstance(module, LAYERS):
        return "default" if key == "weight" else None
    for kind, keys in FUSED.items():
        if isinstance(module, kind) and key.startswith(keys):
            return "fused"
    return None


def _ancestors(path: str) -> list[str]:
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


def _is_empty(parameter: nn.Parameter) -> bool:
    return not isinstance(parameter, UninitializedParameter) and parameter.numel() == 0


def qualified(path: str, key: str) -> str:
    """Qualified name of a module's parameter."""
    return f"{path}.{key}" if path else key


def _both_patterns(include: LayerPatterns, exclude: LayerPatterns) -> tuple[list[Pattern], list[Pattern]]:
    wanted, unwanted = _as_patterns(include, "include"), _as_patterns(exclude, "exclude")
    both = {p for p in wanted if isinstance(p, str)} & {p for p in unwanted if isinstance(p, str)}
    if both:
        raise ValueError(f"include and exclude both name {sorted(both)}; remove it from one of them")
    return wanted, unwanted


def _as_patterns(patterns: LayerPatterns, argument: str) -> list[Pattern]:
    if patterns is None:
        return []
    if not isinstance(patterns, (str, type, list, tuple, set, frozenset)):
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


def _check_matches(argument: str, pattern: Pattern, candidates: Sequence[_Candidate]) -> None:
    if any(c.matches(pattern) for c in candidates):
        return
    shown = pattern.__name__ if isinstance(pattern, type) else pattern
    also = sorted({alias for c in candidates for alias in c.aliases})  # modules and classes
    hint = nearest(shown, [c.name for c in candidates], also)
    raise ValueError(f"{argument} pattern {shown!r} matches no prunable weight. {hint}")


def _report_fused(skipped: Sequence[_Candidate]) -> None:
    if skipped:
        names = ", ".join(c.name for c in skipped)
        warnings.warn(f"not pruned: fused weights {names}; name them in `include` to prune them", stacklevel=4)


def _report_computed(model: nn.Module) -> None:
    """Warn of weights that are computed from other parameters."""
    # Zeros in those parameters would not be zeros of the weight.
    computed = [
        path
        for path, module in model.named_modules()
        if isinstance(module, LAYERS) and "weight" not in dict(module.named_parameters(recurse=False))
        if "weight_mask" not in dict(module.named_buffers(recurse=False))  # of torch.nn.utils.prune
    ]
    if computed:
        names = ", ".join(computed)
        warnings.warn(
            f"not pruned: the weights of {names} are computed (weight_norm, spectral_norm, a parametrization)",
            stacklevel=4,
        )


def _check_built(chosen: Sequence[_Candidate]) -> None:
    for c in chosen:
        if isinstance(c.parameter, UninitializedParameter):
            raise ValueError(
                f"layer {c.name!r} is lazy and has no shape yet: run one forward pass "
                "(in Lightning: in configure_model) before pruning"
            )


def _nothing_selected(model: nn.Module, include: LayerPatterns, exclude: LayerPatterns) -> str:
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and n.endswith("weight") and p.ndim > 1]
    reason = f"; these are frozen (requires_grad=False): {frozen[:5]}" if frozen else ""
    return (
        f"no weight to prune in {type(model).__name__} with include={include!r}, exclude={exclude!r}: "
        f"by default the weights of Linear, Conv and ConvTranspose layers are pruned{reason}"
    )
