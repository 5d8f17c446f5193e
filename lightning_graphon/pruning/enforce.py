"""Keep pruned weights at zero while any optimizer trains the others."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_graphon.pruning.masks import Masks

# With weight, gradient and state at zero, one step of these leaves exactly zero: no need to look again.
_ZERO_PRESERVING = {
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Enforcer:
    """Keeps the pruned weights of a network exactly zero, and their gradients, until it is detached.

    Gradients are zeroed as autograd writes them, before clipping or the optimizer sees them. Optimizer state of
    pruned weights (momentum of an earlier, dense life) is zeroed on attaching and whenever the optimizer loads a
    state. After each step of an optimizer that could move a weight without a gradient the weights are zeroed again.

    Args:
        model: The network; its parameters keep their identity.
        masks: Which weights are kept.
        optimizers: The optimizers that train it.

    Raises:
        ValueError: The masks were made for another model.

    >>> net = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> with Enforcer(net, Masks({"weight": torch.tensor([[True, False]])}), optimizer):
    ...     net(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> net.weight[0, 1].item()
    0.0
    """

    def __init__(self, model: nn.Module, masks: Masks, *optimizers: Optimizer) -> None:
        self._erasers = {parameter: _Eraser(mask) for parameter, mask in masks.pairs(model)}
        self._optimizers = optimizers
        self._handles: list[Any] = []
        self.zero_weights()
        for parameter, eraser in self._erasers.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(_erase_grad(eraser)))
        for optimizer in optimizers:
            self._attach(optimizer)

    def _attach(self, optimizer: Optimizer) -> None:
        self._handles.append(optimizer.register_load_state_dict_post_hook(lambda opt: self.zero_state()))
        if type(optimizer) not in _ZERO_PRESERVING:
            self._handles.append(optimizer.register_step_post_hook(lambda opt, args, kwargs: self.zero_weights()))
        self.zero_state()

    @torch.no_grad()
    def zero_weights(self) -> None:
        """Zero the pruned weights and their gradients."""
        for parameter, erase in self._erasers.items():
            erase(parameter)
            if parameter.grad is not None:
                erase(parameter.grad)

    @torch.no_grad()
    def zero_state(self) -> None:
        """Zero what the optimizers remember of pruned weights: every state tensor of a weight's shape."""
        for optimizer in self._optimizers:
            for parameter, erase in self._erasers.items():
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        erase(value)

    def detach(self) -> None:
        """Stop: remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "Enforcer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.zero_weights()
        self.detach()


class _Eraser:
    """Sets pruned entries of a tensor to zero, also where they are NaN or infinite."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self._cache: dict[Any, Tensor] = {}

    @torch.no_grad()
    def __call__(self, tensor: Tensor) -> None:
        integer = _INTEGERS.get(tensor.element_size()) if tensor.device.type == "cpu" else None
        if integer is None or tensor.is_complex():
            tensor.masked_fill_(self._on(tensor.device, None), 0)
        else:
            # On a CPU an AND with all-ones or all-zeros is four times faster than masked_fill.
            tensor.view(integer).bitwise_and_(self._on(tensor.device, integer))

    def _on(self, device: torch.device, integer: torch.dtype | None) -> Tensor:
        key = (device, integer)
        if key not in self._cache:
            mask = self._mask.to(device)
            self._cache = {key: ~mask if integer is None else mask.to(integer).neg_()}
        return self._cache[key]


def _erase_grad(erase: _Eraser) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            erase(parameter.grad)

    return hook


def zero_fraction(model: nn.Module, masks: Mapping[str, Tensor]) -> float:
    """Fraction of the masked weights that are zero in the model now: the sparsity by weights, not by masks."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = [parameters[name].detach() for name in masks]
    total = sum(weight.numel() for weight in weights)
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / total if total else 0.0
