"""Copies of pruned weights that no optimizer trains: a teacher, a target network, an average; or a dense reference."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_graphon.pruning.candidates import as_patterns, find_candidates
from lightning_graphon.pruning.config import PruningConfig
from lightning_graphon.pruning.layer_selection import find_weights
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.sharding import local_shard, local_shard_like

_SAMPLE = 1024  # entries by which a change is noticed


@torch.no_grad()
def find_copies(model: nn.Module, weights: Collection[str], untrained: Collection[str]) -> dict[str, str]:
    """Parameters and buffers that have the values of a weight; to be asked before it is pruned.

    Args:
        model: Any module.
        weights: Names of the weights.
        untrained: Parameters that no optimizer moves.

    Returns:
        Name of the copy -> name of the weight.

    >>> net = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2).requires_grad_(False)})
    >>> _ = net["teacher"].load_state_dict(net["student"].state_dict())
    >>> find_copies(net, ["student.weight"], ["teacher.weight"])
    {'teacher.weight': 'student.weight'}
    """
    tensors = _tensors(model)
    others = [*(name for name in untrained if name not in weights), *(name for name, _ in model.named_buffers())]
    found = {name: [w for w in weights if _is_copy(tensors[name], tensors[w])] for name in others}
    return {name: sources[0] for name, sources in found.items() if sources}


def without_copies(model: nn.Module, config: PruningConfig, untrained: Collection[str]) -> PruningConfig:
    """The same that leaves out copies of the weights it selects, which `CopyWatch` prunes."""
    weights = find_weights(model, config.include, config.exclude)
    copies = find_copies(model, weights, untrained)
    names = [c.name for c in find_candidates(model) if c.name in copies and c.name not in weights]
    return replace(config, exclude=[*as_patterns(config.exclude, "exclude"), *names])


class CopyWatch:
    """Prunes copies like their weights as soon as something writes to them.

    An average or a target network would keep for long what its weight has lost; a reference, to which nobody writes,
    has to stay dense.

    Args:
        model: Holds both.
        copies: As `find_copies` finds them.
    """

    def __init__(self, model: nn.Module, copies: dict[str, str]) -> None:
        tensors = _tensors(model)
        self._copies = {name: (source, _sample(tensors[name]).clone()) for name, source in copies.items()}
        self._pruned: dict[str, str] = {}

    @torch.no_grad()
    def prune_changed(self, model: nn.Module, masks: Masks) -> list[str]:
        """Zero the pruned entries of copies that have changed, once; their names."""
        if not self._copies:
            return []
        tensors = _tensors(model)
        changed = {
            name: source
            for name, (source, before) in self._copies.items()
            if name in tensors and source in masks and not torch.equal(_sample(tensors[name]), before)
        }
        for name in changed:
            del self._copies[name]
        self._pruned |= changed
        _prune(tensors, changed, masks)
        return list(changed)

    @torch.no_grad()
    def prune_again(self, model: nn.Module, masks: Masks) -> None:
        """Zero the pruned entries of copies that were pruned before, by masks that have changed since."""
        if self._pruned:
            _prune(_tensors(model), self._pruned, masks)


def _prune(tensors: Mapping[str, Tensor], copies: Mapping[str, str], masks: Masks) -> None:
    for name, source in copies.items():
        if name in tensors and source in masks:
            local_shard(tensors[name]).masked_fill_(~local_shard_like(masks[source], tensors[name]), 0)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}


def _sample(tensor: Tensor) -> Tensor:
    entries = local_shard(tensor).detach().reshape(-1)
    return entries[:: max(1, entries.numel() // _SAMPLE)]


def _is_copy(tensor: Tensor, weight: Tensor) -> bool:
    if tensor is weight or (tensor.shape, tensor.dtype, tensor.device) != (weight.shape, weight.dtype, weight.device):
        return False
    ours, theirs = local_shard(tensor), local_shard(weight)
    # A constant is an initialisation that two layers may share.
    return torch.equal(ours, theirs) and bool((ours != ours.reshape(-1)[:1]).any())
