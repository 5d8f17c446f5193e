"""Layers by class name: which of their parameters are weights, and which axes run over outputs and inputs."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

# Qualified class name -> its weights and their axes: o outputs, i inputs, e experts (one matrix for each); the taps of
# convolutions come last. By name, so that no library has to be imported; the first line that matches holds.
_LAYERS: dict[str, Mapping[str, str]] = {
    "torch.nn.modules.linear.Linear": {"weight": "oi"},
    "torch.nn.modules.conv.Conv[123]d": {"weight": "oi"},
    "torch.nn.modules.conv.ConvTranspose[123]d": {"weight": "io"},
    "transformers.*.Conv1D": {"weight": "io"},
    **{
        f"transformers.*.{name}Experts": {"gate_up_proj": "eio", "down_proj": "eio"}
        for name in ("Aria", "GptOss", "Llama4Text", "OpenAIPrivacyFilter")
    },
    "transformers.*ParallelExperts": {"weight": "eoi"},
    "transformers.*Experts": {"gate_up_proj": "eoi", "up_proj": "eoi", "down_proj": "eoi"},
    "torch_geometric.nn.*.Linear": {"weight": "oi"},
    "torch_geometric.nn.*.HeteroLinear": {"weight": "eio"},
}
_found: dict[type, Mapping[str, str]] = {}
_KINDS = ("oi", "io", "eoi", "eio")


def register_layer(kind: type[nn.Module] | str, **axes: str) -> None:
    """Prune the weights of a layer class by default, and say which axes they have.

    Args:
        kind: The class, or its qualified name, a glob such as "my_models.*.Dense"; subclasses count.
        axes: Parameter -> "oi" for [out, in, *taps], "io" for [in, out, *taps], "eoi" or "eio" for one such matrix per
            expert.

    Raises:
        ValueError: Axes are none of these.

    >>> class Dense(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.kernel = nn.Parameter(torch.ones(4, 2))
    >>> register_layer(Dense, kernel="io")
    >>> layout_of(Dense(), "kernel").rows(torch.ones(4, 2)).shape
    torch.Size([2, 4])
    """
    for name, value in axes.items():
        if value not in _KINDS:
            raise ValueError(f"the axes of {name!r} must be one of {_KINDS}, got {value!r}")
    pattern = kind if isinstance(kind, str) else _qualified(kind)
    others = {name: known for name, known in _LAYERS.items() if name != pattern}
    _LAYERS.clear()
    _LAYERS.update({pattern: axes, **others})
    _found.clear()


def weight_axes(module: nn.Module) -> Mapping[str, str]:
    """The weights of a layer and their axes; empty for a module that is no layer."""
    kind = type(module)
    if kind not in _found:
        _found[kind] = _look_up(kind)
    return _found[kind]


def _look_up(kind: type) -> Mapping[str, str]:
    for base in kind.__mro__:
        for pattern, axes in _LAYERS.items():
            if fnmatchcase(_qualified(base), pattern):
                return axes
    return {}


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class WeightLayout(NamedTuple):
    """How a weight is stored.

    Attributes:
        transposed: Inputs come before outputs.
        groups: Of a convolution.
        experts: Number of matrices, one after the other; 0 for a single one without that axis.
    """

    transposed: bool = False
    groups: int = 1
    experts: int = 0

    def rows(self, tensor: Tensor) -> Tensor:
        """To [out, in / groups, *taps], a view where possible; the units of experts one below the other."""
        stacked = tensor.flatten(0, 1) if self.experts else tensor
        return swap_sides(stacked, (self.experts or self.groups) if self.transposed else 0)

    def stored(self, rows: Tensor) -> Tensor:
        """Back from `rows`."""
        tensor = swap_sides(rows, (self.experts or self.groups) if self.transposed else 0)
        return tensor.unflatten(0, (self.experts, -1)) if self.experts else tensor

    def matrix(self, shape: torch.Size) -> torch.Size:
        """Shape [out, in / groups, *taps] of the weight, or of each expert's."""
        rows = self.rows(torch.empty(shape, device="meta")).shape
        return torch.Size([rows[0] // self.experts, *rows[1:]]) if self.experts else rows


def layout_of(model: nn.Module, name: str) -> WeightLayout:
    """Layout of the parameter of this qualified name; that of a Linear layer where the module is not known.

    >>> layout_of(nn.ConvTranspose1d(4, 6, 3, groups=2), "weight")
    WeightLayout(transposed=True, groups=2, experts=0)
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    axes = weight_axes(module).get(key, "oi")
    groups = getattr(module, "groups", 1) if axes in ("oi", "io") else 1
    experts = len(getattr(module, key)) if axes[0] == "e" else 0
    return WeightLayout(axes.endswith("io"), groups if isinstance(groups, int) else 1, experts)


def in_rows(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks or other tensors of weights, by name, as `WeightLayout.rows` turns them."""
    return {name: layout_of(model, name).rows(tensor) for name, tensor in tensors.items()}


def swap_sides(tensor: Tensor, groups: int) -> Tensor:
    """[in, out / groups, *taps] to [out, in / groups, *taps], and back; a view with one group, the same with none.

    >>> swap_sides(torch.ones(4, 3, 5), groups=2).shape
    torch.Size([6, 2, 5])
    """
    if groups < 2:
        return tensor.transpose(0, 1) if groups else tensor
    return tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def correct_sizes(module: nn.Module) -> None:
    """Set the sizes that a layer holds besides its tensors to those of the tensors.

    >>> layer = nn.Linear(4, 2)
    >>> layer.weight = nn.Parameter(torch.ones(2, 3))
    >>> correct_sizes(layer)
    >>> layer
    Linear(in_features=3, out_features=2, bias=True)
    """
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _ConvNd):
        first, second = len(weight), weight.shape[1] * module.groups
        module.out_channels, module.in_channels = (second, first) if module.transposed else (first, second)
    elif isinstance(module, _NormBase):
        size = next((len(t) for t in (weight, module.running_mean) if t is not None), module.num_features)
        module.num_features = size
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers'
        conv1d: Any = module
        conv1d.nx, conv1d.nf = weight.shape
