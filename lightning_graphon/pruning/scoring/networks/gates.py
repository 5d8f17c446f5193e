"""The gates of ReLUs: which are open on data, the same ones with other weights, and all of them open."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_RELUS: frozenset[Callable[..., Tensor]] = frozenset(
    (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.leaky_relu_)
)


class Ungated(TorchFunctionMode):
    """Inside, ReLU and leaky ReLU return their inputs: a network of them is linear.

    >>> with Ungated():
    ...     torch.nn.ReLU()(torch.tensor([-1.0, 2.0]))
    tensor([-1.,  2.])
    """

    def gated(self, x: Tensor, relu: Callable[[], Tensor]) -> Tensor:
        """What a ReLU returns for x."""
        return x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RELUS:
            x = args[0] if args else kwargs["input"]
            return self.gated(x, lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


class RecordedGates(Ungated):
    """Inside, ReLUs work as ever, and it is noted which let their inputs through.

    Attributes:
        gates: Whether inputs are positive, bool, a tensor for every call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gates: list[Tensor] = []

    def gated(self, x: Tensor, relu: Callable[[], Tensor]) -> Tensor:
        """The ReLU of x."""
        self.gates.append(x > 0)
        return relu()


class FixedGates(Ungated):
    """Inside, ReLUs are these gates, one after the other: inputs pass unchanged or not at all.

    >>> with FixedGates([torch.tensor([True, False])]):
    ...     torch.relu(torch.tensor([-1.0, 2.0]))
    tensor([-1.,  0.])

    Args:
        gates: As `RecordedGates` notes them.
    """

    def __init__(self, gates: Iterable[Tensor]) -> None:
        super().__init__()
        self._gates = iter(gates)

    def gated(self, x: Tensor, relu: Callable[[], Tensor]) -> Tensor:
        """x where the gate is open, else zero."""
        return x * next(self._gates)
