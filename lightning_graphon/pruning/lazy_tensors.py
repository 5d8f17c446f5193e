"""Tensors by name that are computed on access, so that they are never all in memory."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class LazyTensorMapping(Mapping[str, Tensor]):
    """A mapping whose values are computed at each access and not kept.

    Args:
        shapes: Name -> shape of the tensor.
        compute: Function from a name to its tensor.

    >>> halves = LazyTensorMapping({"a": torch.Size([2])}, lambda name: torch.full((2,), 0.5))
    >>> halves["a"]
    tensor([0.5000, 0.5000])
    """

    def __init__(self, shapes: Mapping[str, torch.Size], compute: Callable[[str], Tensor]) -> None:
        self.shapes = dict(shapes)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        # Without this check `compute` would decide how an unknown name fails.
        if name not in self.shapes:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of every tensor, without computing lazy ones."""
    return (
        dict(tensors.shapes)
        if isinstance(tensors, LazyTensorMapping)
        else {n: tensor.shape for n, tensor in tensors.items()}
    )
