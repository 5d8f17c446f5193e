"""Which axis of a weight runs over its outputs: a transposed convolution's first axis is its inputs."""

from torch import Tensor, nn


def transposed_groups(model: nn.Module, name: str) -> int:
    """Groups of the transposed convolution whose parameter has this qualified name; 0 for every other module.

    >>> transposed_groups(nn.ConvTranspose1d(4, 6, 3, groups=2), "weight")
    2
    """
    module = model.get_submodule(name.rpartition(".")[0])
    return int(module.groups) if getattr(module, "transposed", False) else 0  # type: ignore[arg-type]


def swap_sides(tensor: Tensor, groups: int) -> Tensor:
    """[in, out / groups, *taps] to [out, in / groups, *taps], and back; a view with one group, the same with none.

    >>> import torch
    >>> swap_sides(torch.ones(4, 3, 5), groups=2).shape
    torch.Size([6, 2, 5])
    """
    if groups < 2:
        return tensor.transpose(0, 1) if groups else tensor
    return tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
