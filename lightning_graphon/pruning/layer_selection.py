"""Select weights to prune by name, glob, regular expression or module type."""

import warnings
from collections.abc import Iterable, Sequence
from inspect import getattr_static

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_graphon._shared.checks import as_kind
from lightning_graphon._shared.weight_layout import weight_axes
from lightning_graphon.pruning.candidates import (
    FUSED,
    LAYER,
    Candidate,
    LayerPatterns,
    Pattern,
    as_patterns,
    both_patterns,
    check_matches,
    find_candidates,
    patterns_for,
    taken,
)
from lightning_graphon.pruning.computed_weights import revives_zeros

_DENSE_SHARE = 0.1  # of all weights of two or more dimensions; where more stay dense, it is told
_MOST_NAMED = 5


def select_weights(
    model: nn.Module, include: LayerPatterns = None, exclude: LayerPatterns = None
) -> dict[str, nn.Parameter]:
    """Weights to prune, by qualified parameter name, in the order of `model.named_parameters()`.

    By default the `weight` of every Linear, Conv and ConvTranspose layer and of layers of other libraries that do the
    same (transformers' Conv1D, PyTorch Geometric's Linear, tensors of experts, `register_layer`); never biases,
    normalisation, frozen parameters or anything inside a torchmetrics metric. A tied weight appears once.

    A pattern of `include` takes the trainable weights of layers that it matches, fused ones of attention, recurrent and
    bilinear layers too; where it matches none of these, any trainable parameter of two or more dimensions; where it
    matches none of these either, frozen ones.

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

    Warns:
        UserWarning: By default fused or computed weights, or more than a tenth of all, stay dense; or a layer computes
            another weight from the one selected, in which zeros are no zeros.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> list(select_weights(net))
    ['0.weight', '2.weight']
    >>> list(select_weights(net, exclude="2"))
    ['0.weight']
    """
    candidates = find_candidates(as_kind("model", model, nn.Module))
    chosen = _choose(model, candidates, include, exclude)
    if include is None:
        _report_dense(model, candidates, chosen, exclude)
    _report_changed_zeros(chosen)
    return {c.name: c.parameter for c in chosen}


def find_weights(
    model: nn.Module, include: LayerPatterns = None, exclude: LayerPatterns = None
) -> dict[str, nn.Parameter]:
    """As `select_weights`, to read them: nothing is told of the others."""
    return {c.name: c.parameter for c in _choose(model, find_candidates(model), include, exclude)}


def _choose(
    model: nn.Module, candidates: Sequence[Candidate], include: LayerPatterns, exclude: LayerPatterns
) -> list[Candidate]:
    wanted, unwanted = both_patterns(include, exclude)
    for pattern in unwanted:
        check_matches("exclude", pattern, candidates)
    named = {c.name for pattern in wanted for c in taken(pattern, candidates)}
    chosen = [
        c
        for c in candidates
        if (c.name in named if wanted else c.by_default) and not any(c.matches(p) for p in unwanted)
    ]
    if not chosen:
        raise ValueError(_nothing_selected(model, candidates, include, exclude))
    _check_built(chosen)
    return chosen


def check_patterns(model: nn.Module, include: LayerPatterns = None, exclude: LayerPatterns = None) -> None:
    """Raise unless every pattern names a weight that can be pruned.

    Raises:
        TypeError: A pattern is neither a string nor a module type.
        ValueError: A pattern matches nothing (the message suggests the nearest), or both arguments name the same.
    """
    weights = find_candidates(model)
    for argument, patterns in zip(("include", "exclude"), both_patterns(include, exclude), strict=True):
        for pattern in patterns:
            check_matches(argument, pattern, weights)


def match_layers(pattern: Pattern, model: nn.Module, names: Iterable[str]) -> list[str]:
    """The `names` of selected weights that `pattern` matches.

    Raises:
        ValueError: It matches none of them; the message suggests the nearest.
    """
    allowed = set(names)
    candidates = [c for c in find_candidates(model) if c.name in allowed]
    check_matches("allocation", pattern, candidates)
    return [c.name for c in candidates if c.matches(pattern)]


def _report_dense(
    model: nn.Module, candidates: Sequence[Candidate], chosen: Sequence[Candidate], exclude: LayerPatterns
) -> None:
    """Warn of weights that stay dense though nobody asked for it."""
    reasons = _why_dense(model, candidates, chosen, as_patterns(exclude, "exclude"))
    if reasons:
        warnings.warn(f"not pruned: {'; nor '.join(reasons)}", stacklevel=4)


def _why_dense(
    model: nn.Module, candidates: Sequence[Candidate], chosen: Sequence[Candidate], unwanted: Sequence[Pattern]
) -> list[str]:
    reasons, computed = [], _computed(model)
    left = [c for c in candidates if c not in chosen and not any(c.matches(p) for p in unwanted)]
    if fused := [c.name for c in left if c.kind == FUSED and c.parameter.requires_grad]:
        reasons.append(f"fused weights {', '.join(fused)}; name them in `include` to prune them")
    if computed:
        reasons.append(
            f"the weights of {', '.join(computed)} are computed (weight_norm, spectral_norm, torch.nn.utils.prune, a "
            "parametrization): remove that first to prune them"
        )
    inside = tuple(f"{path}." for path in computed)
    rest = [c for c in left if c.name not in fused and not c.name.startswith(inside) and not c.name.endswith("bias")]
    rest = [c for c in rest if _is_built(c)]
    total = sum(c.parameter.numel() for c in candidates if _is_built(c))
    share = sum(c.parameter.numel() for c in rest) / max(total, 1)
    if share > _DENSE_SHARE:
        shown = _shown([c.name + " (frozen)" * (not c.parameter.requires_grad) for c in rest])
        reach = ["*", *patterns_for(rest, candidates)]
        reasons.append(f"{share:.0%} of the weights in matrices: {shown}; include={reach} prunes them, too")
    return reasons


def _computed(model: nn.Module) -> list[str]:
    """Layers whose weights are computed from other parameters."""
    # Zeros in those parameters would not be zeros of the weight.
    return [
        path
        for path, module in model.named_modules()
        for key in weight_axes(module).keys() - dict(module.named_parameters(recurse=False)).keys()
        if getattr_static(module, key, None) is not None  # not evaluated: spectral_norm counts its evaluations
    ]


def _report_changed_zeros(chosen: Sequence[Candidate]) -> None:
    """Warn of layers that use another weight than the one that is pruned."""
    layers = [c for c in chosen if c.kind == LAYER and c.parameter.shape[1] > 1]
    smallest = {type(c.module): c.module for c in sorted(layers, key=lambda c: -c.parameter.numel())}
    kinds = {kind for kind, module in smallest.items() if revives_zeros(module)}
    if kinds:
        names, shown = sorted(kind.__name__ for kind in kinds), [c.name for c in chosen if type(c.module) in kinds]
        warnings.warn(
            f"pruned, but not zero where they are used: {_shown(shown)}. {', '.join(names)} compute what they use from "
            f"the parameter, as weight standardisation does; exclude={names} leaves them dense",
            stacklevel=4,
        )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _is_built(candidate: Candidate) -> bool:
    return not isinstance(candidate.parameter, UninitializedParameter)


def _check_built(chosen: Sequence[Candidate]) -> None:
    for c in chosen:
        if not _is_built(c):
            raise ValueError(
                f"layer {c.name!r} is lazy and has no shape yet: run one forward pass "
                "(in Lightning: in configure_model) before pruning"
            )


def _nothing_selected(
    model: nn.Module, candidates: Sequence[Candidate], include: LayerPatterns, exclude: LayerPatterns
) -> str:
    frozen = [c.name for c in candidates if not c.parameter.requires_grad]
    reason = f"; these are frozen (requires_grad=False): {frozen[:_MOST_NAMED]}" if frozen else ""
    dense = _why_dense(model, candidates, [], as_patterns(exclude, "exclude"))
    return (
        f"no weight to prune in {type(model).__name__} with include={include!r}, exclude={exclude!r}: "
        f"by default the weights of Linear, Conv and ConvTranspose layers are pruned{reason}"
        + "".join(f"; not pruned: {text}" for text in dense)
    )
