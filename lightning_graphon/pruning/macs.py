"""Multiply-accumulates of a network, dense and with masks; masks give no speed-up by themselves."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import checked, nearest
from lightning_graphon._shared.evaluation import uncompiled
from lightning_graphon._shared.model_io import call_model
from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon._shared.weight_layout import layout_of, weight_axes
from lightning_graphon.pruning.candidates import FUSED_KEYS, qualified


class Macs(NamedTuple):
    """Multiply-accumulates; twice as many floating-point operations."""

    dense: int
    kept: int


@checked
def theoretical_macs(model: nn.Module, inputs: Any, masks: Mapping[str, Tensor] | None = None) -> dict[str, Macs]:
    """Multiply-accumulates of all Linear, Conv and ConvTranspose weights and the like in one forward pass, by layer.

    Every weight of a layer is used as often as the layer is applied: once per sample and token, or per position of the
    output (of a transposed convolution: of the input), padding included. With masks only kept weights count, as on
    hardware that skips all zeros: **masks give no speed-up by themselves**. Biases, norms, activations and products of
    activations with each other (attention scores) are not counted.

    Args:
        model: Any module; run once in eval mode and restored.
        inputs: Its inputs: a tensor, a tuple of arguments or a dict of keyword arguments. The numbers are for this
            many samples.
        masks: Name -> bool tensor, True = kept; layers without one are dense.

    Returns:
        Parameter name -> Macs, in network order, and last "total". A tied weight has its first name and all of its
        uses. Weights that were not used by a call of their layer (fused attention, recurrent layers) are left out, and
        one warning names them.

    Raises:
        ValueError: The masks were made for another model.

    >>> net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    >>> theoretical_macs(net, torch.ones(2, 20))["total"]
    Macs(dense=1500, kept=1500)
    """
    # A tied weight has several names; all of its uses are counted under the first.
    first = {parameter: name for name, parameter in model.named_parameters()}
    layers = {module: first.get(module.weight, name) for name, module in _layers(model)}
    sizes = {name: module.weight.numel() for module, name in layers.items()}
    aliases = {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)}
    kept = _kept({} if masks is None else masks, sizes, aliases)
    uses = _uses(model, inputs, layers)
    _report_unseen(model, [name for name in sizes if name not in uses])
    found = {n: Macs(uses[n] * size, uses[n] * kept.get(n, size)) for n, size in sizes.items() if n in uses}
    return {**found, "total": Macs(sum(m.dense for m in found.values()), sum(m.kept for m in found.values()))}


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer that multiplies its inputs by one matrix, with the name of its weight."""
    for path, module in model.named_modules():
        if weight_axes(module).get("weight", "") in ("oi", "io"):
            yield qualified(path, "weight"), module


def _kept(masks: Mapping[str, Tensor], sizes: Mapping[str, int], aliases: Mapping[str, str]) -> dict[str, int]:
    """Number of kept weights by the first name of the parameter."""
    kept = {}
    for alias, mask in masks.items():
        name = aliases.get(alias, alias)
        if name not in aliases and name not in sizes:
            raise ValueError(f"the masks were made for another model: no weight {name!r}. {nearest(name, aliases)}")
        if mask.numel() != sizes.get(name, mask.numel()):
            raise ValueError(
                f"the masks were made for another model: {name!r} has {sizes[name]} weights, its mask {mask.numel()}"
            )
        kept[name] = int(mask.count_nonzero())
    return kept


def _uses(model: nn.Module, inputs: Any, layers: Mapping[Any, str]) -> Counter[str]:
    """Name -> number of products in which each of the layer's weights takes part."""
    uses: Counter[str] = Counter()

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        source = args[0] if args else kwargs["input"]
        # Each weight meets every position of every channel of one side.
        if getattr(module, "transposed", False):
            uses[layers[module]] += source.numel() // len(module.weight)
        else:
            uses[layers[module]] += output.numel() // layout_of(module, "weight").matrix(module.weight.shape)[0]

    with preserve_module_state(model), uncompiled(model), torch.no_grad():  # the first removes the hooks
        for module in layers:
            module.register_forward_hook(count, with_kwargs=True)
        call_model(model.eval(), inputs)
    return uses


def _report_unseen(model: nn.Module, layers: Sequence[str]) -> None:
    fused = [path or type(m).__name__ for path, m in model.named_modules() if isinstance(m, tuple(FUSED_KEYS))]
    unseen = [*layers, *fused]
    if unseen:
        warnings.warn(f"not counted, as no call of a Linear or Conv layer used them: {', '.join(unseen)}", stacklevel=4)
